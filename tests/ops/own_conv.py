"""What stands on the CPU for the kernels of conv2d_fwd and conv2d_bwd, which only a GPU has: torch's convolution between
bn_act's native ops. With it the chain of them runs anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from norms import CL
from torch import Tensor
from torch.nn import functional as tf

from nvae_fast.kernels import _auto, _impl

RAW = torch.ops.nvae_fast


def table(x: Tensor, bn: Tensor | None) -> Tensor:
    """bn, or that of the normalisation which changes nothing."""
    return torch.tensor([0.0, 1, 1, 1, 0])[:, None].repeat(1, x.shape[1]) if bn is None else bn


def forward(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, dilation: int, stats: bool, means: bool = False,
            *following: Any):  # fmt: skip
    a = RAW.bn_act_fwd(x, table(x, bn), act)
    y = tf.conv2d(a, weight, None, 1, dilation, dilation).contiguous(memory_format=CL)
    found = RAW.bn_act_stats(y, *following) if stats else y.new_empty(0, len(weight), dtype=torch.float32)
    return y, found, y.float().mean((2, 3)) if means else y.new_empty(0, len(weight), dtype=torch.float32)


def backward(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int, weight: Tensor,
             dilation: int, count: float = 0.0):  # fmt: skip
    if c is not None:
        scale, by_y, shift = (c if len(c) == 3 else torch.cat((torch.ones_like(c[:1]), c)))[:, :, None, None].unbind()
        dy = (scale * dy + by_y * y + shift).to(dy.dtype)
    given, bn = bn, table(x, bn)
    sizes = [1] * 2, [dilation] * 2, [dilation] * 2, False, [0, 0], 1, [True, True, False]
    da, dw, _ = torch.ops.aten.convolution_backward(dy, RAW.bn_act_fwd(x, bn, act), weight, None, *sizes)
    ones = torch.tensor([1.0, 0, 0])[:, None].repeat(1, x.shape[1])
    sums = RAW.bn_act_sums(da, x, bn, act, count)
    return (
        RAW.bn_act_bwd(da, x, bn, act, ones),
        torch.empty_like(weight).copy_(dw),
        sums[: 0 if given is None else None].clone(),
    )


@contextmanager
def on_cpu() -> Iterator[None]:
    """impl="triton" of conv2d and preact_branch runs on CPU tensors, by the two above where they fit."""
    with torch.library._scoped_library("nvae_fast", "IMPL") as library:
        library.impl("conv2d_fwd", forward, "CPU")
        library.impl("conv2d_bwd", backward, "CPU")
        kinds = {"conv2d": {"triton": lambda tensors: None}}
        with patch.dict(_impl._ops, kinds), patch.dict(_auto.TRITON, {"conv2d": _auto.Wins("a test")}):
            yield
