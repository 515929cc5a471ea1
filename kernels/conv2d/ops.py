"""Schemas, shapes and autograd of `conv2d`: torch's convolution between the native stages of `bn_act`.

Of a 3x3 of stride 1 a GPU has kernels of its own, which apply act(BN(x)) on the way in and take statistics of y on the way out:
`conv2d_fwd` and `conv2d_bwd`, with the meaning of pointwise_conv's arguments. `fits` says what they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm, _triton
from nvae_fast.kernels._autograd import first_order, thirds
from nvae_fast.kernels._lent import last_pass
from nvae_fast.kernels._norm import FOLLOWING, Following
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.conv2d.reference import conv2d

PARTS = len(_norm.Parts._fields)
TILE = 8  # of pixels: both sides of an image are multiples of it

torch.library.define(
    "nvae_fast::conv2d_fwd",
    f"(Tensor x, Tensor? bn, int act, Tensor weight, int dilation, bool stats, bool means=False, {FOLLOWING}) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "nvae_fast::conv2d_bwd",
    "(Tensor dy, Tensor? y, Tensor? c, Tensor x, Tensor? bn, int act, Tensor weight, int dilation, float count=0.) "
    "-> (Tensor, Tensor, Tensor)",
)
_triton.register("conv2d", "conv2d_fwd", "conv2d_bwd")


@torch.library.register_fake("nvae_fast::conv2d_fwd")
def _forward_shapes(
    x: Tensor, bn: Tensor | None, act: int, weight: Tensor, dilation: int, stats: bool, means: bool = False, *following: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_image(x, x.shape[0], weight.shape[0], *x.shape[2:])
    rows = Following(*following).rows(stats), x.shape[0] if means else 0
    return y, *(x.new_empty(n, weight.shape[0], dtype=torch.float32) for n in rows)


@torch.library.register_fake("nvae_fast::conv2d_bwd")
def _backward_shapes(
    dy: Tensor,
    y: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    dilation: int,
    count: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    table = x.new_empty(0 if bn is None else GRADIENTS, x.shape[1], dtype=torch.float32)
    return empty_image(x, *x.shape), torch.empty_like(weight), table


def fits(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1, dilation: int = 1) -> str | None:
    """Why those kernels cannot take this convolution; None where they can."""
    if x.dtype not in _triton.DTYPES:
        return f"it takes float32, bfloat16 or float16, not {str(x.dtype).removeprefix('torch.')}"
    if tuple(weight.shape[2:]) != (3, 3) or stride != 1 or padding != dilation or dilation > 2:
        sizes = f"{weight.shape[2]}x{weight.shape[3]}, stride {stride}, padding {padding}, dilation {dilation}"
        return f"it takes 3x3 convolutions of stride 1 whose padding is their dilation, 1 or 2, not {sizes}"
    if x.shape[2] % TILE or x.shape[3] % TILE:
        return f"it takes images whose sides are multiples of {TILE}, not {x.shape[2]}x{x.shape[3]}"
    return None


class NormConv2d(torch.autograd.Function):
    """conv2d(act(norm(x)), weight, bias); keeps x, the weight and bn [5, C], and computes act(norm(x)) again. Moves the running
    statistics. x is an output as well, `readers` times, for what else reads it: those gradients then come here, added in the
    last pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        config: _norm.NormConfig,
        act: int,
        sizes: tuple[int, int, int],
        readers: int,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        bn, count = _norm.coefficients(x, _norm.Parts(*parts), config)
        y = conv2d(torch.ops.nvae_fast.bn_act_fwd(x, bn, act), weight, bias, *sizes)
        ctx.save_for_backward(x, weight, bn)
        ctx.settings = config, act, sizes, count, None if bias is None else [len(bias)]
        ctx.set_materialize_grads(False)
        return y, *[x.view_as(x) for _ in range(readers)]

    @staticmethod
    @first_order("conv2d")
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        also = _norm.others(others)
        if dy is None:
            return _norm.total(also), *(None for _ in ctx.needs_input_grad[1:])
        raw = torch.ops.nvae_fast
        x, weight, bn = ctx.saved_tensors
        config, act, (stride, padding, dilation), count, bias = ctx.settings
        wanted = ctx.needs_input_grad
        before = wanted[0] or any(wanted[7:])  # whether the normalisation is differentiated
        a = raw.bn_act_fwd(x, bn, act)
        da, dweight, dbias = torch.ops.aten.convolution_backward(
            dy, a, weight, bias, [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], 1,
            [before, wanted[1], bias is not None and wanted[2]],
        )  # fmt: skip
        del a
        dx, parts = None, (None,) * len(wanted[7:])
        if before:
            table = raw.bn_act_sums(da, x, bn, act, count)
            c, parts = _norm.gradients(table, bn, count, config, wanted[7:])
            dx = last_pass(ctx, da, x, c, also, bn, act)
        return dx, dweight, dbias, None, None, None, None, *parts


class PreactBranch(torch.autograd.Function):
    """Returns (y, means of y over space [B, C_out] or, not wanted, [0, C_out], *`readers` times x) of [norm -> act -> 3x3]
    once for each weight, by the kernels that `fits` speaks of:

        x --bn0, act, 3x3--> t1 --bn1, act, 3x3--> y

    Each convolution takes the statistics of what it writes on the way out, up to the table of the normalisation that follows;
    in backward it takes the backward of that normalisation on the way in (c0 dy + c1 y + c2) and leaves the two sums that the
    one before it needs. Keeps x, what is between the convolutions, and the tables; moves the running statistics. x is an
    output for what else reads it: those gradients then come here, added in the last pass.

    `tensors`: the weights, then the parts of the normalisation before each.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        configs: Sequence[_norm.NormConfig],
        act: int,
        dilations: Sequence[int],
        means: bool,
        readers: int,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        stages = len(configs)
        norms = [_norm.Parts(*tensors[i : i + PARTS]) for i in range(stages, len(tensors), PARTS)]
        y, taken = x, None
        images, tables, counts = [], [], []
        for i, (weight, parts, config) in enumerate(zip(tensors, norms, configs, strict=False)):
            bn, count = _norm.coefficients(y, parts if taken is None else parts._replace(stats=taken), config)
            images.append(y), tables.append(bn), counts.append(count)
            wanted = i + 1 < stages and norms[i + 1].stats is None
            behind = _norm.following(norms[i + 1], configs[i + 1]) if wanted else Following()
            sums = means and i + 1 == stages
            y, taken, pooled = torch.ops.nvae_fast.conv2d_fwd(y, bn, act, weight, dilations[i], wanted, sums, *behind)
            taken = taken if wanted else None
        ctx.save_for_backward(*images, *tables, *tensors[:stages])
        ctx.settings = configs, act, dilations, counts
        ctx.mark_non_differentiable(pooled)
        ctx.set_materialize_grads(False)
        return y, pooled, *[x.view_as(x) for _ in range(readers)]

    @staticmethod
    @first_order("preact_branch")
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        also = _norm.others(others)
        if dy is None:
            return _norm.total(also), *(None for _ in ctx.needs_input_grad[1:])
        raw = torch.ops.nvae_fast
        images, tables, weights = thirds(ctx.saved_tensors)
        configs, act, dilations, counts = ctx.settings
        wanted, stages = ctx.needs_input_grad[6:], len(configs)
        du, y, c = dy, None, None
        dweights, parts = [None] * stages, [None] * stages
        for i in reversed(range(stages)):
            x, bn = images[i], tables[i]
            du, dweights[i], table = raw.conv2d_bwd(du, y, c, x, bn, act, weights[i], dilations[i], counts[i])
            c, parts[i] = _norm.gradients(table, bn, counts[i], configs[i], wanted[stages + i * PARTS :][:PARTS])
            y = x
        if ctx.needs_input_grad[0]:
            du = last_pass(ctx, du, images[0], c, also)
        found = du, *(None,) * 5, *dweights
        given = (g if w else None for g, w in zip(found, ctx.needs_input_grad, strict=False))
        return *given, *(g for p in parts for g in p)
