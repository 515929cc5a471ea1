"""The noise that a model draws itself: group by group on the CPU, for all groups at once where a launch costs."""

from __future__ import annotations

import pytest
import torch
from models import CONFIG, build, images
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast import model as module


class Draws(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "randn":
            self.sizes.append(found.numel())
        return found


@pytest.fixture(params=[False, True], ids=["by group", "at once"])
def at_once(request, monkeypatch):
    monkeypatch.setattr(module, "drawn_at_once", lambda device: request.param)
    return request.param


def test_which_devices_draw_at_once():
    assert module.drawn_at_once(torch.device("cuda", 1)) and not module.drawn_at_once(torch.device("cpu"))


def test_a_pass_and_samples_draw_what_they_are_given_back(at_once):
    """The generator's numbers, each group's its own; given as noise they make the same bits."""
    model, shapes, batch = build().eval(), CONFIG.latent_shapes, 3
    numbers = [batch * torch.Size(shape).numel() for shape in shapes]
    with torch.no_grad(), Draws() as draws:
        sampled = model.sample(batch, generator=torch.Generator().manual_seed(7))
        torch.manual_seed(7)
        out = model(images(batch=batch))
    padded = [-(-n // 4) * 4 for n in numbers]
    assert draws.sizes == ([sum(padded)] if at_once else numbers) * 2
    generator = torch.Generator().manual_seed(7)
    if at_once:
        flat = torch.randn(sum(padded), generator=generator).split(padded)
        noise = [t[:n].view(batch, h, w, z).permute(0, 3, 1, 2) for t, n, (z, h, w) in zip(flat, numbers, shapes, strict=True)]
    else:
        noise = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    with torch.no_grad(), Draws() as draws:
        assert torch.equal(model.sample(batch, noise=noise), sampled)
        for found, given in zip(out, model(images(batch=batch), noise), strict=True):
            assert torch.equal(found, given)
    assert not draws.sizes


def test_each_group_has_noise_of_its_own_that_the_kernels_read_as_the_latents(at_once):
    model = build(image_size=(4, 12))  # 45 numbers of a top group
    shapes = model.config.latent_shapes
    found = model._noise(None, 5, torch.Generator().manual_seed(0))
    if not at_once:
        assert found == [None] * len(shapes)
        return
    assert [tuple(t.shape) for t in found] == [(5, *shape) for shape in shapes] and found[0].numel() == 45
    assert all(t.is_contiguous(memory_format=torch.channels_last) and t.data_ptr() % 16 == 0 for t in found)
    assert torch.cat([t.flatten() for t in found]).unique().numel() == sum(t.numel() for t in found)
    assert [t.dtype for t in (*model.bfloat16()._noise(None, 1), *model.double()._noise(None, 1))] == (
        [torch.float32] * len(found) + [torch.float64] * len(found)
    )
    assert all(t.shape[0] == 0 for t in model._noise(None, 0))
