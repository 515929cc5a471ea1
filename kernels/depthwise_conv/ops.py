"""Schema, shapes and autograd of `depthwise_conv`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate

_ARGUMENTS = "Tensor x, Tensor weight, int stride, int dilation"
torch.library.define("nvae_fast::depthwise_conv_fwd", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("nvae_fast::depthwise_conv_bwd", f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor)")

MAX_KERNEL = 11
_compiled = native_predicate("cpu", torch.float32, torch.bfloat16)


def cpu_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cpu" on (x, weight)."""
    if len(tensors) > 1 and tensors[1].shape[-1] > MAX_KERNEL:
        return f"it takes kernels up to {MAX_KERNEL}, not {tensors[1].shape[-1]}"
    return _compiled(tensors)


@torch.library.register_fake("nvae_fast::depthwise_conv_fwd")
def _forward_shape(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.new_empty(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return y.contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("nvae_fast::depthwise_conv_bwd")
def _backward_shapes(dy: Tensor, x: Tensor, weight: Tensor, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.channels_last), weight.new_empty(weight.shape)


class DepthwiseConv(torch.autograd.Function):
    """Keeps x and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = stride, dilation
        return torch.ops.nvae_fast.depthwise_conv_fwd(x, weight, stride, dilation)

    @staticmethod
    @first_order("depthwise_conv")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = torch.ops.nvae_fast.depthwise_conv_bwd(dy, *ctx.saved_tensors, *ctx.sizes)
        return dx, dweight, None, None
