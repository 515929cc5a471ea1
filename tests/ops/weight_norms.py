"""What the tests of weight_norm share: inputs, a run with gradients, the plain formula."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _impl
from nvae_fast.kernels.weight_norm import weight_norm

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
SHAPES = [(4, 3, 3, 3), (5, 2), (6, 1, 5, 5), (3, 4, 1)]
LARGE = [(7, 33, 3, 3), (2, 1200), (65, 1, 1, 1)]
LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "output channel innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "half of the rows": lambda t: torch.cat([t, t]).chunk(2)[1],
    "half of the columns": lambda t: torch.cat([t, t], 1).chunk(2, 1)[0],
}


def make(dtype=torch.float32, shapes=SHAPES):
    """Weights, log_norms and masks (none, float, bool, none, ...); values are those of float32 in every dtype."""
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    norms = [torch.randn((s[0],) + (1,) * (len(s) - 1), generator=g).to(dtype) for s in shapes]
    masks = [None if i % 4 in (0, 3) else torch.rand(s, generator=g) < 0.6 for i, s in enumerate(shapes)]
    masks[1] = masks[1].float()
    return weights, norms, masks


def incoming(weights, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=g).to(w.dtype) for w in weights]


def run(weights, norms, masks, impl, grads=None):
    """Effective weights, then the gradients of all weights and log_norms."""
    leaves = [t.detach().requires_grad_() for t in (*weights, *norms)]
    out = weight_norm(leaves[: len(weights)], leaves[len(weights) :], masks, impl=impl)
    return [*out, *torch.autograd.grad(out, leaves, grads or incoming(weights))]


def plain(w, norm, mask, eps=1e-5):
    w = w if mask is None else w * mask
    length = torch.linalg.vector_norm(w, dim=list(range(1, w.dim())), keepdim=True)
    return norm.exp() * w / (length + eps)
