"""A training step of ours, its ops and its optimiser, beside the published formulation with torch.optim.Adamax, from the states
that a run of the demo on its images comes to."""

from __future__ import annotations

import copy

import pytest
import torch

from nvae_fast.benchmarks.plain import plain
from nvae_fast.benchmarks.steps import Step
from nvae_fast.model import NVAE
from nvae_fast.presets import PRESETS
from nvae_fast.regularization import SpectralState
from nvae_fast.training.data import open_split

CONFIG, BATCH, AT = PRESETS["demo"], 8, (0, 50, 100, 200)
CL = torch.channels_last


def batch(images, number):
    """Images [B, 1, 32, 32] in {0, 1}, and noise."""
    generator = torch.Generator().manual_seed(number)
    chosen = torch.randint(len(images), (BATCH,), generator=generator)
    grey = torch.nn.functional.pad(images[chosen].permute(0, 3, 1, 2) / 255, [CONFIG.padding] * 4)
    x = (torch.rand(grey.shape, generator=generator) < grey).float()
    return x, [torch.randn(BATCH, *shape, generator=generator) for shape in CONFIG.latent_shapes]


def after_one(ours, name, **changed):
    """(loss, parameters and statistics end to end) after the next step from where `ours` is, in float64."""
    dtype = torch.float64 if name == "exact" else torch.float32
    model, spectral = copy.deepcopy(ours.model), SpectralState()
    spectral.load_state_dict({key: t.to(dtype) for key, t in ours.spectral.state_dict().items()})
    if name != "ours":
        model = plain(model).to(dtype)
    step = Step(model, spectral, ours.x.to(dtype), [z.to(dtype) for z in ours.noise], "auto" if name == "ours" else "reference")
    assert ("Fused" in type(step.optimizer).__name__) == (name == "ours")
    step.optimizer.load_state_dict(copy.deepcopy(ours.optimizer.state_dict()))
    step.optimizer.param_groups[0].update(changed)
    loss = step.backward()
    step.optimizer.step()
    return loss.double().item(), everything(model)


def everything(model):
    return torch.cat([t.detach().double().flatten() for t in (*model.parameters(), *model.buffers())])


def compare(ours, **changed):
    """Loss and the vector of all that moves are within the budget of a step."""
    eps = torch.finfo(torch.float32).eps
    (loss, weights), (plain_loss, plain_weights) = after_one(ours, "ours", **changed), after_one(ours, "plain")
    exact_loss, exact = after_one(ours, "exact")
    assert (exact - everything(ours.model)).norm() > 1e-4 * exact.norm()  # a step is no small thing beside the budget
    assert abs(loss - exact_loss) <= 2 * (abs(plain_loss - exact_loss) + eps * abs(exact_loss))
    assert (weights - exact).norm() <= 2 * ((plain_weights - exact).norm() + eps * exact.norm())


def test_single_steps_from_shared_states():
    torch.manual_seed(0)
    images = open_split(CONFIG, "train").images
    x, noise = batch(images, 0)
    ours = Step(NVAE(CONFIG).to(memory_format=CL).train(), SpectralState(), x, noise, "auto")
    with torch.no_grad():
        ours.spectral(ours.model.convolutions())  # its long first run
    for number in range(max(AT) + 1):
        x, ours.noise = batch(images, number)
        ours.x = x.contiguous(memory_format=CL)
        if number in AT:
            compare(ours)
        ours()
    for fault in ({"weight_decay": 0.0}, {"lr": 0.99 * CONFIG.training.learning_rate}):
        with pytest.raises(AssertionError):
            compare(ours, **fault)
