"""What the tests of the native logistic_mixture_log_prob share."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _impl
from nvae_fast.kernels.logistic_mixture import logistic_mixture_channels, logistic_mixture_log_prob

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
DTYPES = [torch.float32, torch.bfloat16]


def make(channels=3, mixtures=2, bits=8, size=(2, 5, 7), dtype=torch.float32, scale=1.0, seed=0):
    """x on the levels, and params that bfloat16 holds exactly, so that every dtype sees the same numbers."""
    g = torch.Generator().manual_seed(seed)
    batch, height, width = size
    top = 2**bits - 1
    x = torch.randint(0, top + 1, (batch, channels, height, width), generator=g)
    x[:, :, :1, :3] = torch.tensor([0, top, top - 1])  # both edges and the level below the top
    shape = (batch, logistic_mixture_channels(channels, mixtures), height, width)
    return x.float() / top, (scale * torch.randn(shape, generator=g)).bfloat16().to(dtype)


def run(x, params, impl, mixtures=2, bits=8, compat="nvlabs", grad=None):
    """(log p, gradient of params)"""
    params = params.detach().requires_grad_()
    out = logistic_mixture_log_prob(x, params, num_mixtures=mixtures, num_bits=bits, compat=compat, impl=impl)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return out.detach(), torch.autograd.grad(out, params, grad)[0]


def agrees(within_budget, x, params, **settings):
    exact = run(x.double(), params.double(), "reference", **settings)
    for triple in zip(run(x, params, "cpu", **settings), run(x, params, "reference", **settings), exact, strict=True):
        within_budget(*triple)
