"""A convolution with a normalisation and an activation before it: `depthwise_conv`'s autograd, and what `pointwise_conv` and
`conv2d` check and refer to as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm
from nvae_fast.kernels._autograd import first_order


class NormConv(torch.autograd.Function):
    """Returns (conv(act(norm(x))), its statistics [2, C_out] or [0, C_out]), keeps x and bn, and moves the running statistics.

    Without a norm (config None) it is the convolution alone. The statistics are data and carry no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        op: str,
        config: _norm.NormConfig | None,
        act: int,
        sizes: tuple,
        stats: bool,
        *parts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        bn, count = None, 0.0
        if config is not None:
            bn, count = _norm.coefficients(x, _norm.Parts(*parts), config)
        y, y_stats = getattr(torch.ops.nvae_fast, f"{op}_fwd")(x, bn, act, weight, *sizes, stats)
        ctx.save_for_backward(x, weight, bn)
        ctx.settings = op, config, act, sizes, count
        ctx.mark_non_differentiable(y_stats)
        ctx.set_materialize_grads(False)
        return y, y_stats

    @staticmethod
    @first_order("a fused convolution")
    def backward(ctx: Any, dy: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, bn = ctx.saved_tensors
        op, config, act, sizes, count = ctx.settings
        backward = getattr(torch.ops.nvae_fast, f"{op}_bwd")
        du, dweight, table = backward(dy, None, None, x, bn, act, weight, *sizes, count)
        settings = (None,) * 5
        if config is None:
            return du, dweight, *settings
        c, parts = _norm.gradients(table, bn, count, config, ctx.needs_input_grad[7:])
        torch.ops.nvae_fast.bn_act_affine_(du, x, c)
        return du, dweight, *settings, *parts


def norm_conv(
    op: str, x: Tensor, weight: Tensor, norm: _norm.Norm | None, act: str, sizes: tuple, stats: bool
) -> tuple[Tensor, Tensor]:
    """(y, stats of y), with the running statistics of the norm moved."""
    parts: tuple = ()
    config = None
    if norm is not None:
        parts, config = _norm.tensors(norm), _norm.config(norm, copies=sizes[2] ** 2)
    return NormConv.apply(x, weight, op, config, _norm.ACTIVATIONS.index(act), sizes, stats, *parts)


def check(x: Tensor, weight: Tensor, norm: _norm.Norm | None, act: str, copies: int = 1) -> tuple[Tensor, ...]:
    """The tensors as autocast would have them; raises in one line where arguments do not fit together. The normalisation sees
    every value of x `copies` times."""
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [N, C, H, W]")
    for name, t in (("x", x), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} is {t.dtype}: expected a floating-point tensor; convert it with .float()")
    if act not in _norm.ACTIVATIONS:
        raise ValueError(f"act {act!r}: expected one of {', '.join(_norm.ACTIVATIONS)}")
    if norm is not None:
        _norm.check_norm(norm, x, x.shape[1], "x")
        _norm.check_batch(norm, x.numel() // max(x.shape[1], 1) * copies, x.shape)
    x, weight = _norm.autocast(x, weight)
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}: they must be alike; convert one with .to"
        )
    return x, weight


def normalised(x: Tensor, norm: _norm.Norm | None, act: str) -> Tensor:
    """The reference's prologue."""
    from nvae_fast.kernels.bn_act import reference

    return reference.ACTIVATIONS[act](x) if norm is None else reference.normalised(x, norm, act)


def batch_stats(y: Tensor) -> Tensor:
    """Mean and biased variance [2, C] of y [B, C, H, W] in float32 (float64 for float64), without gradient."""
    wide = y.detach().to(torch.promote_types(y.dtype, torch.float32))
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return torch.stack((mean, var))
