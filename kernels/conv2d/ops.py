"""Autograd of `conv2d`: torch's convolution between the native stages of `bn_act`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _norm
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels.conv2d.reference import conv2d


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
            dx = raw.bn_act_bwd(da, x, bn, act, c, *also)
        return dx, dweight, dbias, None, None, None, None, *parts
