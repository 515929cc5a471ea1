"""Autograd of `inverted_residual`: a chain of the native stages of `pointwise_conv`, `depthwise_conv` and `bn_act`.

    x --bn0, 1x1--> t1 --bn1, swish, depthwise--> t2 --bn2, swish, 1x1--> t3 --bn3--> y

Every stage reads the tensor before its normalisation, which is applied on the way in, and takes the statistics of what it
writes on the way out, up to the table of the normalisation that follows. The backward walks the same stages down: each takes
the backward of the normalisation behind it on the way in (c0 dy + c1 y + c2) and leaves the two sums that the one before it
needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm, _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._lent import last_pass
from nvae_fast.kernels.depthwise_conv import ops as depthwise_ops
from nvae_fast.kernels.pointwise_conv import ops as pointwise_ops

_IDENTITY, _SWISH = 0, 1
PARTS = len(_norm.Parts._fields)


def cpu_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cpu" on (x, depthwise weight)."""
    return depthwise_ops.cpu_can_run(tensors) or pointwise_ops.cpu_can_run(tensors)


triton_can_run = _triton.can_run  # as of every stage


def cuda_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cuda", which is Triton but for the depthwise convolution."""
    return depthwise_ops.cuda_can_run(tensors) or _triton.can_run(tensors)


class InvertedResidual(torch.autograd.Function):
    """Returns (t3, bn3, means of t3 over space [B, C_out] or, not wanted, [0, C_out], *`readers` times x), with the running
    statistics moved. bn3's gradient rows are those of `bn_act.ops.ApplyNorm`; the means are data, whose gradient is that of t3
    already; x is an output for what else reads it: those gradients then come here, added in the last pass.

    Keeps x, t1, t2, t3, or with `low` x and t3: t1 and t2 are then computed again, from the statistics of the forward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor,
        depthwise: Tensor,
        project: Tensor,
        configs: Sequence[_norm.NormConfig],
        stride: int,
        upsample: int,
        low: bool,
        impl: str,
        means: bool,
        readers: int,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _, depthwise_conv_fwd, _ = _raw_ops(impl)
        norms = [_norm.Parts(*parts[i : i + PARTS]) for i in range(0, 4 * PARTS, PARTS)]

        def ready(i: int, t: Tensor, taken: Tensor | None) -> tuple[Tensor, float]:
            return _norm.coefficients(t, norms[i]._replace(stats=taken) if wanted(i) else norms[i], configs[i])

        def wanted(i: int) -> bool:
            return norms[i].stats is None

        behind = [_norm.following(n, c) for n, c in zip(norms, configs, strict=True)]
        bn0, n0 = ready(0, x, None)
        t1, taken, _ = _pointwise(x, bn0, _IDENTITY, expand, wanted(1), False, behind[1])
        bn1, n1 = ready(1, t1, taken)
        t2, taken = depthwise_conv_fwd(t1, bn1, _SWISH, depthwise, stride, 1, upsample, wanted(2), *behind[2])
        bn2, n2 = ready(2, t2, taken)
        t3, taken, pooled = _pointwise(t2, bn2, _SWISH, project, wanted(3), means, behind[3])
        bn3, n3 = ready(3, t3, taken)
        kept = (None, None) if low else (t1, t2)
        ctx.save_for_backward(x, *kept, t3, expand, depthwise, project, bn0, bn1, bn2, bn3)
        ctx.settings = configs, stride, upsample, (n0, n1, n2, n3), impl
        ctx.mark_non_differentiable(pooled)
        ctx.set_materialize_grads(False)
        return t3, bn3, pooled, *[x.view_as(x) for _ in range(readers)]

    @staticmethod
    @first_order("inverted_residual")
    def backward(
        ctx: Any, dt3: Tensor | None, dbn3: Tensor | None, _: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        also = _norm.others(others)
        if dt3 is None and dbn3 is None:
            return _norm.total(also), *(None for _ in ctx.needs_input_grad[1:])
        x, t1, t2, t3, expand, depthwise, project, bn0, bn1, bn2, bn3 = ctx.saved_tensors
        configs, stride, upsample, counts, impl = ctx.settings
        raw, depthwise_conv_fwd, depthwise_conv_bwd = _raw_ops(impl)
        dt3, dbn3 = (torch.zeros_like(t) if d is None else d for d, t in ((dt3, t3), (dbn3, bn3)))
        if t1 is None:
            t1 = raw.pointwise_conv_fwd(x, bn0, _IDENTITY, expand, False, False)[0]
            t2 = depthwise_conv_fwd(t1, bn1, _SWISH, depthwise, stride, 1, upsample, False)[0]
        wanted = [ctx.needs_input_grad[11:][i : i + PARTS] for i in range(0, 4 * PARTS, PARTS)]

        def gradients(i: int, table: Tensor, bn: Tensor) -> tuple[Tensor, _norm.Parts]:
            return _norm.gradients(table, bn, counts[i], configs[i], wanted[i])

        c, parts3 = _norm.applied_gradients(dbn3, bn3, counts[3], configs[3], wanted[3])
        behind = None if c is None else t3
        du, dproject, table, *_ = raw.pointwise_conv_bwd(dt3, behind, c, t2, bn2, _SWISH, project, counts[2])
        c, parts2 = gradients(2, table, bn2)
        if stride * upsample == 1 and impl != "cuda":  # whose tiles overlap in dy: du is memory of its own
            ddepthwise, table = raw.depthwise_conv_bwd_(du, t2, c, t1, bn1, _SWISH, depthwise, 1, counts[1])
        else:
            sizes = stride, 1, upsample
            du, ddepthwise, table = depthwise_conv_bwd(du, t2, c, t1, bn1, _SWISH, depthwise, *sizes, counts[1])
        del t2
        c, parts1 = gradients(1, table, bn1)
        du, dexpand, table, *_ = raw.pointwise_conv_bwd(du, t1, c, x, bn0, _IDENTITY, expand, counts[0])
        c, parts0 = gradients(0, table, bn0)
        dx = last_pass(ctx, du, x, c, also)
        return dx, dexpand, ddepthwise, dproject, *(None,) * 7, *parts0, *parts1, *parts2, *parts3


def _pointwise(
    x: Tensor, bn: Tensor, act: int, weight: Tensor, stats: bool, means: bool, behind: _norm.Following
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, its statistics, or the table of the normalisation behind it; its means over space)"""
    return torch.ops.nvae_fast.pointwise_conv_fwd(x, bn, act, weight, stats, means, None, None, None, *behind)


def _raw_ops(impl: str) -> tuple[Any, Any, Any]:
    """(all, depthwise_conv's forward and backward)"""
    raw, name = torch.ops.nvae_fast, depthwise_ops.raw_name(impl)
    return raw, getattr(raw, f"{name}_fwd"), getattr(raw, f"{name}_bwd")
