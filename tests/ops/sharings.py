"""What the tests of shared_weights share: parameters of every kind, and a run with gradients."""

from __future__ import annotations

import torch

from nvae_fast.kernels.shared_weights import SharedWeights
from nvae_fast.kernels.weight_norm import weight_norm

SHAPES = [(6, 5, 3, 3), (17, 8, 1, 1), (5, 1, 5, 5), (4, 7), (2, 3, 2, 2), (9,), (6, 8, 3, 3), (16,), (3, 4, 3, 3), (5, 16)]
NORMED, MASKED = (0, 3, 6, 8), (6, 8)
TERMS = {0: "spectral", 1: "spectral", 2: "spectral", 5: "norm", 6: "spectral", 7: "norm", 9: "spectral"}
BY_TERM_ALONE, UNUSED = (1, 6), (4,)  # everything else has a gradient from its use
FACTORS = {"spectral": 0.3, "norm": 0.7}
OWN_TYPE = (5, 8)  # their values are of the type of the parameter
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


class Passing(torch.autograd.Function):
    """A number whose gradient is g, with the strides of g."""

    @staticmethod
    def forward(ctx, w, g):
        ctx.g = g
        return (w * g).float().sum()

    @staticmethod
    def backward(ctx, d):
        return ctx.g if d == 1 else d * ctx.g, None


def drawn(wide=torch.float32, layout="contiguous", seed=0):
    """Weights, log_norms, masks, and by number the vectors of terms."""
    g = torch.Generator().manual_seed(seed)
    weights = [LAYOUTS[layout](torch.randn(s, generator=g)).to(wide).requires_grad_() for s in SHAPES]
    norms = [0.3 * torch.randn((s[0],) + (1,) * (len(s) - 1), generator=g).to(wide) for s in SHAPES]
    norms = [n.requires_grad_() if i in NORMED else None for i, n in enumerate(norms)]
    masks = [torch.rand(s, generator=g) < 0.7 if i in MASKED else None for i, s in enumerate(SHAPES)]
    vectors = {}
    for i in TERMS:
        rows = SHAPES[i][0] if len(SHAPES[i]) > 1 else 1
        u, v = (torch.randn(n, generator=g).to(wide) for n in (rows, weights[i].numel() // rows))
        vectors[i] = (None if len(SHAPES[i]) == 1 else u), v
    return weights, norms, masks, vectors


def run(impl, low=torch.float32, wide=torch.float32, of_weights="contiguous", of_grads="contiguous", values_only=False):
    """The values, then the gradients of all parameters (None: none), of a loss that uses most values, and adds the terms;
    `impl` None: by autograd alone."""
    weights, norms, masks, vectors = drawn(wide, of_weights)
    dtypes = [wide if i in OWN_TYPE else low for i in range(len(SHAPES))]
    g = torch.Generator().manual_seed(1)
    upstream = [LAYOUTS[of_grads](torch.randn(s, generator=g).to(low)).to(d) for s, d in zip(SHAPES, dtypes, strict=True)]
    if impl is None:
        full = list(weights)
        for i in NORMED:
            full[i] = weight_norm([weights[i]], [norms[i]], [masks[i]], impl="reference")[0]
        values = [w.to(d) for w, d in zip(full, dtypes, strict=True)]
        penalty = 0
        for i, (u, v) in vectors.items():
            product = full[i] * v if u is None else full[i].flatten(1) * torch.outer(u, v)
            penalty = penalty + FACTORS[TERMS[i]] * product.sum()
    else:
        shared = SharedWeights(weights, norms, masks, dtypes, impl=impl)
        values = shared.values
        penalty = sum(c * shared.claim(name) for name, c in FACTORS.items())
        shared.terms.update({i: (TERMS[i], *vectors[i]) for i in TERMS})
    used = [i for i in range(len(SHAPES)) if i not in (*BY_TERM_ALONE, *UNUSED)]
    loss = sum(Passing.apply(values[i], upstream[i]) for i in used) + penalty
    leaves = [*weights, *(n for n in norms if n is not None)]
    return [v.detach() for v in values], torch.autograd.grad(loss, leaves, allow_unused=True)


def compare(within_budget, impl, low, of_weights, of_grads):
    """Values and gradients of `impl` are within the budget of autograd's own, which the same parameters have none of."""
    exact = run(None, torch.float64, torch.float64, of_weights, of_grads)
    plain = run(None, low, torch.float32, of_weights, of_grads)
    got = run(impl, low, torch.float32, of_weights, of_grads)
    rounded = run(None, low, torch.float64, of_weights, of_grads)[1]  # what comes in is of type `low` for everyone
    for a, b, c in zip(got[0], plain[0], exact[0], strict=True):
        assert a.dtype == b.dtype
        within_budget(a, b, c, a.dtype)
    for a, b, c in zip(got[1], plain[1], rounded, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == torch.float32
            within_budget(a, b, c, torch.float32)
