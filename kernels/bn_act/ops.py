"""Schemas, shapes and autograd of `bn_act`. The native code registers itself for these schemas when it loads.

`bn` [5, C] is a normalisation ready for use (mean, var, 1/sigma, scale, shift), `act` a position in `_norm.ACTIVATIONS`. A
table of gradients [7, C] has sum(du), which is the bias's, sum(du (x - mean)), the weight's, the three rows c of dx = c0 du
+ c1 x + c2, where du is averaged over `count` values (infinite, or 0: the statistics stand fixed), and the offset's: sum(dx).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm, _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate
from nvae_fast.kernels._lent import last_pass

GRADIENTS = 7  # rows of a table of gradients

torch.library.define("nvae_fast::bn_act_stats", f"(Tensor x, {_norm.FOLLOWING}) -> Tensor")
# And the running statistics moved by a batch of `count` values; without rate they average all batches. The running mean is that
# of values that have an `offset` [C] beside those that the statistics are of.
torch.library.define(
    "nvae_fast::bn_act_coefficients",
    "(Tensor stats, Tensor? weight, Tensor? bias, float eps, Tensor(a!)? running_mean=None, Tensor(b!)? running_var=None, "
    "Tensor(c!)? batches=None, float? rate=None, float count=0., Tensor? offset=None) -> Tensor",
)
torch.library.define("nvae_fast::bn_act_gradients", "(Tensor sums, Tensor bn, float count) -> Tensor")
torch.library.define("nvae_fast::bn_act_fwd", "(Tensor x, Tensor bn, int act) -> Tensor")
torch.library.define("nvae_fast::bn_act_sums", "(Tensor dy, Tensor x, Tensor bn, int act, float count=0.) -> Tensor")
torch.library.define(  # `also`, then `also2`, are added to dx where there are such: other gradients of the same x
    "nvae_fast::bn_act_bwd",
    "(Tensor dy, Tensor x, Tensor bn, int act, Tensor c, Tensor? also=None, Tensor? also2=None) -> Tensor",
)
torch.library.define(
    "nvae_fast::bn_act_affine_", "(Tensor(a!) du, Tensor x, Tensor c, Tensor? also=None, Tensor? also2=None) -> ()"
)

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register(
    "bn_act",
    *("bn_act_stats", "bn_act_coefficients", "bn_act_gradients", "bn_act_fwd", "bn_act_sums", "bn_act_bwd", "bn_act_affine_"),
)


def empty_image(like: Tensor, *shape: int) -> Tensor:
    """[N, C, H, W], channels-last, as every native op returns its images."""
    return torch.empty_like(like.new_empty(shape), memory_format=torch.channels_last)


@torch.library.register_fake("nvae_fast::bn_act_stats")
def _stats_shape(x: Tensor, *following: Any) -> Tensor:
    return x.new_empty(_norm.Following(*following).rows(True), x.shape[1], dtype=torch.float32)


@torch.library.register_fake("nvae_fast::bn_act_coefficients")
def _coefficients_shape(
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    batches: Tensor | None = None,
    rate: float | None = None,
    count: float = 0.0,
    offset: Tensor | None = None,
) -> Tensor:
    return stats.new_empty(5, stats.shape[1])


@torch.library.register_fake("nvae_fast::bn_act_gradients")
def _gradients_shape(sums: Tensor, bn: Tensor, count: float) -> Tensor:
    return sums.new_empty(GRADIENTS, sums.shape[1])


@torch.library.register_fake("nvae_fast::bn_act_fwd")
def _forward_shape(x: Tensor, bn: Tensor, act: int) -> Tensor:
    return empty_image(x, *x.shape)


@torch.library.register_fake("nvae_fast::bn_act_sums")
def _sums_shape(dy: Tensor, x: Tensor, bn: Tensor, act: int, count: float = 0.0) -> Tensor:
    return x.new_empty(GRADIENTS, x.shape[1], dtype=torch.float32)


@torch.library.register_fake("nvae_fast::bn_act_bwd")
def _backward_shape(dy: Tensor, x: Tensor, bn: Tensor, act: int, c: Tensor, also: Tensor | None = None,
                    also2: Tensor | None = None) -> Tensor:  # fmt: skip
    return empty_image(x, *x.shape)


@torch.library.register_fake("nvae_fast::bn_act_affine_")
def _affine_shape(du: Tensor, x: Tensor, c: Tensor, also: Tensor | None = None, also2: Tensor | None = None) -> None:
    return None


class BnAct(torch.autograd.Function):
    """Returns (act(BN(x)), *`readers` times x), keeps x and bn, and moves the running statistics. x is an output for what else
    reads it: those gradients then come here, and are added in the last pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        config: _norm.NormConfig,
        act: int,
        readers: int,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        bn, count = _norm.coefficients(x, _norm.Parts(*parts), config)
        ctx.save_for_backward(x, bn)
        ctx.count, ctx.config, ctx.act = count, config, act
        ctx.set_materialize_grads(False)
        return torch.ops.nvae_fast.bn_act_fwd(x, bn, act), *[x.view_as(x) for _ in range(readers)]

    @staticmethod
    @first_order("bn_act")
    def backward(ctx: Any, dy: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        also = _norm.others(others)
        if dy is None:
            return _norm.total(also), *(None for _ in ctx.needs_input_grad[1:])
        x, bn = ctx.saved_tensors
        table = torch.ops.nvae_fast.bn_act_sums(dy, x, bn, ctx.act, ctx.count)
        c, parts = _norm.gradients(table, bn, ctx.count, ctx.config, ctx.needs_input_grad[4:])
        return last_pass(ctx, dy, x, c, also, bn, ctx.act), None, None, None, *parts


class ApplyNorm(torch.autograd.Function):
    """y = scale (x - mean) + bias for a normalisation bn [5, C] of the whole of x, whose own dependence on x is somebody else's
    to differentiate: dx has the scale alone.

    What is returned as the gradient of bn says the rest, linear in the two sums: row 0 is the weight's, rows 1 and 2 are c1 and
    c2 of dx + c1 x + c2, the gradient where x is what the statistics are of, row 3 is sum(dy (x - mean)), the scale's, and row
    4 is sum(dy), the bias's.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bn: Tensor) -> Tensor:
        ctx.save_for_backward(x, bn)
        return torch.ops.nvae_fast.bn_act_fwd(x, bn, 0)

    @staticmethod
    @first_order("bn_act")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, bn = ctx.saved_tensors
        table = torch.ops.nvae_fast.bn_act_sums(dy, x, bn, 0, float(x.numel() // max(x.shape[1], 1)))
        dbn = torch.stack([table[row] for row in (2, 4, 5, 1, 0)])
        scale = torch.zeros_like(bn[:3])
        scale[0].copy_(bn[3])
        return torch.ops.nvae_fast.bn_act_bwd(dy, x, bn, 0, scale), dbn
