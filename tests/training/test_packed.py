"""Statistics of batch norms in few buffers, so that a step keeps and restores them in few launches."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.kernels import _impl
from nvae_fast.training.packed import Packed

from .stepping import NUMBERS, Run, batch, moved


def tensors():
    g = torch.Generator().manual_seed(0)
    return [torch.randn(5, generator=g), torch.tensor(3), torch.randn(2, 3, generator=g), torch.tensor(7), torch.empty(0)]


@pytest.fixture(params=["native", "plain"])
def native(request, monkeypatch):
    """With storages of their own, or as views where there is no native code."""
    if request.param == "plain":
        monkeypatch.setattr(_impl, "load_native", lambda: (None, "left out"))
    elif _impl.load_native()[0] is None:
        pytest.skip("nvae_fast was installed without its native extension")
    return request.param == "native"


def test_tensors_stay_what_they_are_and_their_buffers_hold_them(native):
    some, values = tensors(), tensors()
    packed = Packed(lambda: some)
    floats, integers = packed.buffers()
    for t, value in zip(some, values, strict=True):
        assert torch.equal(t, value) and t.dtype == value.dtype and t.is_contiguous() and t.data_ptr() % 16 == 0
        assert not native or t.untyped_storage().nbytes() == t.numel() * t.element_size()
    assert floats.dtype == torch.float32 and integers.tolist() == [3, 0, 0, 0, 7, 0, 0, 0]
    some[1] += 1
    floats.zero_()
    assert integers[0] == 4 and not some[0].any() and not some[2].any() and packed.intact()


def test_what_was_moved_elsewhere_is_moved_back(native):
    some = tensors()
    packed = Packed(lambda: some)
    some[0].data = torch.full((5,), 2.0)
    assert not packed.intact()
    assert packed.buffers()[0][:5].tolist() == [2.0] * 5 and packed.intact()
    other = Packed(lambda: some)
    assert other.intact() and not packed.intact()


def test_a_model_is_as_before(native):
    """A skipped step restores it, copies and states are of the same values and stand alone."""
    run = Run()
    run(2)
    twin = copy.deepcopy(run.model)
    file = io.BytesIO()
    torch.save(run.model.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)
    before = run.everything()
    bad = batch()
    bad[0, 0, 0, 0] = torch.nan
    assert run.step(bad, **NUMBERS)["skipped"] and not moved(before, run.everything())
    run.model.load_state_dict(saved)
    assert not moved(before, run.everything())
    run()
    assert any("running_mean" in name for name in moved(before, run.everything()))
    assert all(torch.equal(t, saved[name]) for name, t in twin.state_dict().items())
    run.model.double().float()  # new memory for the parameters and buffers
    before = run.everything()
    assert run.step(bad, **NUMBERS)["skipped"] and not moved(before, run.everything())


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.tensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("_foreach_copy_", "cat"):
            self.tensors += len(args[0])
        return func(*args, **(kwargs or {}))


def test_a_step_copies_few_tensors(native):
    run = Run()
    run()
    vectors = len(run.spectral.state_dict())
    with Copies() as copies:
        kept = run.step._keep()
        run.step._restore(kept, torch.tensor(False))
    assert copies.tensors == 3 * (vectors + 2)  # of float32, and one of counters


@pytest.mark.skipif(_impl.load_native()[0] is None, reason="nvae_fast was installed without its native extension")
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_without_values():
    with FakeTensorMode():
        some = tensors()
        packed = Packed(lambda: some)
        assert [t.shape for t in packed.buffers()] == [(16,), (8,)] and some[2].shape == (2, 3)
