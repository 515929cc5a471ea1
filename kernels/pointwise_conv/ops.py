"""Schemas, shapes and autograd of `pointwise_conv`. The native code registers itself for these schemas when it loads.

The backward of a normalisation behind y enters as c [3, C_out]: g = c0 dy + c1 y + c2, or as c [2, C_out] = c1, c2 where dy
holds the scale already (c0 = 1). The backward returns the gradient du of the normalised x (of x without bn, `also` added), the
weight's, the table of gradients [7, C_in] of the normalisation before it (bn_act/ops.py), the bias's where it is asked for, and
that of `beside`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm, _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate
from nvae_fast.kernels._norm import FOLLOWING, Following
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image

torch.library.define(
    "nvae_fast::pointwise_conv_fwd",
    "(Tensor x, Tensor? bn, int act, Tensor weight, bool stats, bool means, Tensor? bias=None, Tensor? addend=None, "
    f"Tensor? beside=None, {FOLLOWING}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "nvae_fast::pointwise_conv_bwd",
    "(Tensor dy, Tensor? y, Tensor? c, Tensor x, Tensor? bn, int act, Tensor weight, float count=0., bool bias=False, "
    "Tensor? also=None, Tensor? beside=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("pointwise_conv", "pointwise_conv_fwd", "pointwise_conv_bwd")


@torch.library.register_fake("nvae_fast::pointwise_conv_fwd")
def _forward_shapes(
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    stats: bool,
    means: bool,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    beside: Tensor | None = None,
    *following: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    n, out = x.shape[0], weight.shape[0]
    y = empty_image(x, n, out, *x.shape[2:])
    found = x.new_empty(Following(*following).rows(stats), out, dtype=torch.float32)
    return y, found, x.new_empty(n if means else 0, out, dtype=torch.float32)


@torch.library.register_fake("nvae_fast::pointwise_conv_bwd")
def _backward_shapes(
    dy: Tensor,
    y: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    count: float = 0.0,
    bias: bool = False,
    also: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    table = x.new_empty(0 if bn is None else GRADIENTS, x.shape[1], dtype=torch.float32)
    dbias = weight.new_empty(weight.shape[0] if bias else 0)
    dbeside = x.new_empty(0) if beside is None else empty_image(beside, *beside.shape)
    return empty_image(x, *x.shape), weight.new_empty(weight.shape), table, dbias, dbeside


class PointwiseConv(torch.autograd.Function):
    """Returns (y, its statistics [2, C_out], or the normalisation [5, C_out] that follows, or [0, C_out], *`readers` times x),
    keeps x, beside and bn, and moves the running statistics. The statistics are data and carry no gradient; x is an output for
    what else reads it: those gradients then come here, and are added in the last pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        addend: Tensor | None,
        beside: Tensor | None,
        config: _norm.NormConfig | None,
        act: int,
        stats: bool,
        readers: int,
        *others: Any,
    ) -> tuple[Tensor, ...]:
        bn, count = None, 0.0
        behind, parts = others[: len(Following._fields)], others[len(Following._fields) :]
        if config is not None:
            bn, count = _norm.coefficients(x, _norm.Parts(*parts), config)
        raw = torch.ops.nvae_fast
        y, y_stats, _ = raw.pointwise_conv_fwd(x, bn, act, weight, stats, False, bias, addend, beside, *behind)
        ctx.save_for_backward(x, weight, beside, bn)
        ctx.settings = config, act, count, bias is not None
        ctx.mark_non_differentiable(y_stats)
        ctx.set_materialize_grads(False)
        return y, y_stats, *[x.view_as(x) for _ in range(readers)]

    @staticmethod
    @first_order("pointwise_conv")
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        also = _norm.others(others)
        if dy is None:
            return _norm.total(also), *(None for _ in ctx.needs_input_grad[1:])
        raw = torch.ops.nvae_fast
        x, weight, beside, bn = ctx.saved_tensors
        config, act, count, bias = ctx.settings
        added = _norm.total(also) if config is None else None
        dx, dweight, table, dbias, dbeside = raw.pointwise_conv_bwd(
            dy, None, None, x, bn, act, weight, count, bias, added, beside
        )
        wanted, parts = ctx.needs_input_grad, ()
        if config is not None:
            c, parts = _norm.gradients(table, bn, count, config, wanted[-len(_norm.Parts._fields) :])
            raw.bn_act_affine_(dx, x, c, *also)
        given = (g if w else None for g, w in zip((dx, dweight, dbias, dy, dbeside), wanted, strict=False))
        return *given, *(None for _ in wanted[5 : len(wanted) - len(parts)]), *parts
