"""What the tests of power_iteration share: inputs, layouts, a run with gradients."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _impl
from nvae_fast.kernels.power_iteration import power_iteration

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]

# (4, 18) appears as three different weight shapes; the order mixes the stacks.
SHAPES = [(4, 2, 3, 3), (6, 5), (4, 18), (3, 1, 5, 5), (6, 5), (4, 18, 1, 1)]
LARGER = [(32, 16, 3, 3), *SHAPES, (13, 700), (1, 8, 3, 3), (96, 1, 5, 5), (7, 1)]
LAYOUTS = {
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda w: torch.stack([w, w], dim=-1)[..., 1],
    "some filters": lambda w: torch.cat([w, w])[len(w) :],
    "a window": lambda w: torch.nn.functional.pad(w, (1, 2))[..., 1:-2],
}


def make(dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    u, v = (
        [torch.nn.functional.normalize(torch.randn(n, generator=g, dtype=torch.float64), dim=0).to(wide) for n in sizes]
        for sizes in ([s[0] for s in shapes], [w[0].numel() for w in weights])
    )
    return weights, u, v


def run(weights, u, v, impl, iterations=4, dtype=None):
    """sigma, all u, all v and the gradients of a weighted sum of sigma, each laid end to end."""
    leaves = [w.to(dtype or w.dtype).detach().requires_grad_() for w in weights]
    sigma, new_u, new_v = power_iteration(leaves, u, v, iterations=iterations, impl=impl)
    grads = torch.autograd.grad(sigma, leaves, torch.linspace(0.5, 1.5, len(sigma)).to(sigma))
    assert all(g.shape == w.shape and g.dtype == w.dtype for g, w in zip(grads, leaves, strict=True))
    return [sigma, torch.cat(new_u), torch.cat(new_v), torch.cat([g.flatten() for g in grads])]
