"""Schema, shapes and autograd of `power_iteration`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order, thirds
from nvae_fast.kernels._impl import native_predicate

# u and v come back laid end to end: outputs of an op may not share memory, and one buffer is cheaper than one per weight.
torch.library.define(
    "nvae_fast::power_iteration_fwd",
    "(Tensor[] weights, Tensor[] u, Tensor[] v, int iterations, float eps) -> (Tensor, Tensor, Tensor)",
)
# layouts: number of axes, sizes and strides of each weight, one weight after the other.
torch.library.define("nvae_fast::power_iteration_bwd", "(Tensor dsigma, Tensor u, Tensor v, SymInt[] layouts) -> Tensor[]")

# The same, each added to the other gradient of its weight, where there is one.
torch.library.define(
    "nvae_fast::power_iteration_add",
    "(Tensor?[] others, Tensor dsigma, Tensor u, Tensor v, SymInt[] layouts) -> Tensor[]",
)

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("power_iteration", "power_iteration_fwd", "power_iteration_bwd")


@torch.library.register_fake("nvae_fast::power_iteration_fwd")
def _forward_shapes(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = len(weights), sum(t.numel() for t in u), sum(t.numel() for t in v)
    sigma, new_u, new_v = (weights[0].new_empty(n, dtype=torch.float32) for n in lengths)
    return sigma, new_u, new_v


@torch.library.register_fake("nvae_fast::power_iteration_bwd")
def _backward_shapes(dsigma: Tensor, u: Tensor, v: Tensor, layouts: Sequence[int]) -> list[Tensor]:
    grads = []
    for _ in range(dsigma.numel()):
        axes = layouts[0]
        size, stride = layouts[1 : 1 + axes], layouts[1 + axes : 1 + 2 * axes]
        layouts = layouts[1 + 2 * axes :]
        grads.append(torch.empty_like(u.new_empty_strided(size, stride)))
    return grads


@torch.library.register_fake("nvae_fast::power_iteration_add")
def _add_shapes(others: Sequence[Tensor | None], dsigma: Tensor, u: Tensor, v: Tensor, layouts: Sequence[int]) -> list[Tensor]:
    return _backward_shapes(dsigma, u, v, layouts)


def layouts(weights: Sequence[Tensor]) -> list[int]:
    """What the schemas call so."""
    return [n for w in weights for n in (w.dim(), *w.shape, *w.stride())]


class PowerIteration(torch.autograd.Function):
    """`apply(iterations, eps, *weights, *u, *v)`, a third each (torch.compile mixes up lists among the arguments). Returns
    (sigma, u, v) with u and v end to end, which are all that it keeps for the backward."""

    @staticmethod
    def forward(ctx: Any, iterations: int, eps: float, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights, u, v = thirds(tensors)
        sigma, new_u, new_v = torch.ops.nvae_fast.power_iteration_fwd(weights, u, v, iterations, eps)
        ctx.layouts = layouts(weights)
        ctx.dtypes = [w.dtype for w in weights]
        ctx.mark_non_differentiable(new_u, new_v)
        ctx.save_for_backward(new_u, new_v)
        ctx.set_materialize_grads(False)
        return sigma, new_u, new_v

    @staticmethod
    @first_order("power_iteration")
    def backward(ctx: Any, dsigma: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dsigma is None:
            return (None,) * (2 + 3 * len(ctx.dtypes))
        u, v = ctx.saved_tensors
        grads = torch.ops.nvae_fast.power_iteration_bwd(dsigma, u, v, ctx.layouts)
        grads = (g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        return (None, None, *grads, *(None for _ in range(2 * len(ctx.dtypes))))
