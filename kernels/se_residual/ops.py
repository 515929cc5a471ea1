"""Schemas, shapes and autograd of `se_residual`. The native code registers itself for these schemas when it loads.

`bn` is what stands before: a normalisation [5, C] (bn_act/ops.py; its gradient is that of `ApplyNorm`), or a bias [C] of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate
from nvae_fast.kernels._lent import Lent
from nvae_fast.kernels._norm import FOLLOWING, Following
from nvae_fast.kernels.bn_act.ops import empty_image

torch.library.define(
    "nvae_fast::se_residual_fwd",
    "(Tensor skip, Tensor x, Tensor? bn, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor? x_means, float residual_scale,"
    f" bool stats, {FOLLOWING}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "nvae_fast::se_residual_bwd",
    "(Tensor dy, Tensor x, Tensor? bn, Tensor? w1, Tensor? w2, Tensor state, float residual_scale) -> Tensor[]",
)
# The two passes of that backward, on a GPU alone. The first, done by what makes dy (_lent.py): dy = c0 du' + c1 y + c2 + also +
# also2, where du' = du act'(scale y + shift) with the table `norm`; without du, du' stands in dy. Returns the shares of dy.
torch.library.define(
    "nvae_fast::se_residual_dy_",
    "(Tensor(a!) dy, Tensor? du, Tensor y, Tensor? norm, int act, Tensor c, Tensor? also, Tensor? also2, "
    "Tensor x, Tensor? bn, Tensor w1, Tensor w2, Tensor state, float residual_scale) -> Tensor",
)
torch.library.define(
    "nvae_fast::se_residual_dx",
    "(Tensor dy, Tensor? bn, Tensor w1, Tensor w2, Tensor state, Tensor shares, float residual_scale) -> Tensor[]",
)

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("se_residual", *(f"se_residual_{name}" for name in ("fwd", "bwd", "dy_", "dx")))


@torch.library.register_fake("nvae_fast::se_residual_fwd")
def _forward_shapes(
    skip: Tensor,
    x: Tensor,
    bn: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    x_means: Tensor | None,
    residual_scale: float,
    stats: bool,
    *following: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    width = 0 if w1 is None else 3 * x.shape[1] + w1.shape[0]
    found = x.new_empty(Following(*following).rows(stats), x.shape[1], dtype=torch.float32)
    return empty_image(x, *x.shape), x.new_empty(x.shape[0], width, dtype=torch.float32), found


@torch.library.register_fake("nvae_fast::se_residual_bwd")
def _backward_shapes(
    dy: Tensor,
    x: Tensor,
    bn: Tensor | None,
    w1: Tensor | None,
    w2: Tensor | None,
    state: Tensor,
    residual_scale: float,
) -> list[Tensor]:
    return _gradients(x, bn, w1, w2)


@torch.library.register_fake("nvae_fast::se_residual_dy_")
def _shares_shape(
    dy: Tensor,
    du: Tensor | None,
    y: Tensor,
    norm: Tensor | None,
    act: int,
    c: Tensor,
    also: Tensor | None,
    also2: Tensor | None,
    x: Tensor,
    bn: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    state: Tensor,
    residual_scale: float,
) -> Tensor:
    return state.new_empty(x.shape[0], 4 * x.shape[1] + w1.shape[0])


@torch.library.register_fake("nvae_fast::se_residual_dx")
def _dx_shapes(
    dy: Tensor,
    bn: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    state: Tensor,
    shares: Tensor,
    residual_scale: float,
) -> list[Tensor]:
    return _gradients(dy, bn, w1, w2)


def _gradients(x: Tensor, bn: Tensor | None, w1: Tensor | None, w2: Tensor | None) -> list[Tensor]:
    found = [empty_image(x, *x.shape)]
    if bn is not None:
        found.append(torch.empty_like(bn))
    if w1 is not None and w2 is not None:
        hidden, channels = w1.shape
        shapes = (hidden, channels), (hidden,), (channels, hidden), (channels,)
        found += [w1.new_empty(shape) for shape in shapes]
    return found


class SEResidual(torch.autograd.Function):
    """Keeps x, bn, the gate's two weight matrices, and per image its means, its gate with the slope, and the hidden units. With
    `lends`, the first pass of its backward may have been done by what made dy."""

    @staticmethod
    def forward(
        ctx: Any,
        skip: Tensor,
        x: Tensor,
        bn: Tensor | None,
        w1: Tensor | None,
        b1: Tensor | None,
        w2: Tensor | None,
        b2: Tensor | None,
        x_means: Tensor | None,
        residual_scale: float,
        lends: bool,
        stats: bool,
        *following: Any,
    ) -> tuple[Tensor, Tensor]:
        gate = w1, b1, w2, b2
        y, state, found = torch.ops.nvae_fast.se_residual_fwd(skip, x, bn, *gate, x_means, residual_scale, stats, *following)
        ctx.save_for_backward(x, bn, w1, w2, state)
        ctx.residual_scale, ctx.lent = residual_scale, None
        if lends and w1 is not None and not torch.compiler.is_compiling():
            ctx.lent = Lent(residual_scale, x, bn, w1, w2, state)
        ctx.mark_non_differentiable(found)
        ctx.set_materialize_grads(False)
        return y, found

    @staticmethod
    @first_order("se_residual")
    def backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, bn, w1, w2, state = ctx.saved_tensors
        shares = None if ctx.lent is None else ctx.lent.shares(dy)
        if shares is None:
            found = iter(torch.ops.nvae_fast.se_residual_bwd(dy, x, bn, w1, w2, state, ctx.residual_scale))
        else:
            found = iter(torch.ops.nvae_fast.se_residual_dx(dy, bn, w1, w2, state, shares, ctx.residual_scale))
        dx = next(found)
        dbn = None if bn is None else next(found)
        gate = tuple(found) or (None,) * 4
        return dy if ctx.needs_input_grad[0] else None, dx, dbn, *gate, *(None for _ in ctx.needs_input_grad[7:])
