"""The doctor: which module of a model first made a value that is not finite."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from nvae_fast import NVAE, PRESETS
from nvae_fast.regularization import SpectralState
from nvae_fast.training.doctor import diagnose

NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return NVAE(PRESETS["demo"])


def look(model, x=None):
    x = torch.rand(4, 1, 32, 32, generator=torch.Generator().manual_seed(0)) if x is None else x
    spectral = SpectralState()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    noise = torch.get_rng_state()
    found = diagnose(model, x, kl_coeff=0.5, norm_coeff=1e-2, spectral=spectral)
    assert all(v.equal(state[k]) or v.isnan().any() for k, v in model.state_dict().items()), "the model changed"
    assert torch.equal(noise, torch.get_rng_state()) and not spectral.u
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    return found


class Poison(torch.autograd.Function):
    """x, with a gradient that is infinite in one place."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        grad.view(-1)[0] = math.inf
        return grad


def test_a_healthy_model(model):
    assert look(model) is None


@pytest.mark.parametrize("name", ["stem", "enc_sampler.1", "dec_tower.0", "pre_process.0"])
def test_a_module_in_the_forward_pass(model, name, monkeypatch):
    module = model.get_submodule(name)
    forward = type(module).forward

    def bad(x, *rest, **options):
        out = forward(module, x, *rest, **options)
        y, *stats = out if options else [out]
        y = torch.where(torch.arange(y.shape[1])[:, None, None] == 1, NAN, y)
        return (y, *stats) if options else y

    monkeypatch.setattr(module, "forward", bad)
    found = look(model)
    assert found.where == f"{name} ({type(module).__name__})"
    assert "its output holds" in found.what and "; its input ranges from " in found.what


def test_something_between_modules(model, monkeypatch):
    draw = nn.functional.elu
    monkeypatch.setattr("torch.nn.functional.elu", lambda *a, **k: draw(*a, **k) * NAN)
    found = look(model)
    assert found.where == "what leads to enc_sampler.0 (WeightNormConv2d)"


@pytest.mark.parametrize("name", ["post_process.0", "enc_sampler.1", "image_conditional.1"])
def test_a_module_in_the_backward_pass(model, name, monkeypatch):
    module = model.get_submodule(name)
    forward = type(module).forward
    monkeypatch.setattr(module, "forward", lambda x, *rest, **options: forward(module, Poison.apply(x), *rest, **options))
    found = look(model)
    assert found.where == f"the backward of {name} ({type(module).__name__})"
    assert found.what.startswith("the gradient of its input holds 0 NaN and 1 infinite of ")


def test_a_buffer(model):
    bn = model.batch_norms()[0]
    kept = bn.running_var.clone()
    bn.running_var[0] = math.inf
    found = look(model)
    bn.running_var.copy_(kept)
    assert found.where.startswith("the buffer ") and found.where.endswith(".running_var")


def test_the_command(cli, refused, finished, own_copy, latest, tmp_path):
    result = cli("doctor", finished, "--batches", 4)
    assert result.code == 0 and result.out.startswith("nothing: loss and gradients of 4 batches from "), result
    from safetensors.torch import load_file, save_file

    path = latest(own_copy) / "model.safetensors"
    tensors = load_file(path)
    tensors["stem.weight"][0, 0, 0, 0] = NAN
    save_file(tensors, path)
    result = cli("doctor", own_copy)
    assert result.code == 1
    assert result.out == "batch 1 of epoch 4: first in the parameter stem.weight: it holds 1 NaN and 0 infinite of 18 values\n"
    refused("nothing to resume at")("doctor", tmp_path)
    refused("--batches=0 must be at least 1")("doctor", finished, "--batches", 0)
    assert json.loads((own_copy / "config.json").read_text())
