"""Schemas and shapes of `pointwise_conv`. The native code registers itself for these schemas when it loads.

The backward of a normalisation behind y enters as c [3, C_out]: g = c0 dy + c1 y + c2, or as c [2, C_out] = c1, c2 where dy
holds the scale already (c0 = 1). The backward returns the gradient du of the normalised x (of x without bn), the weight's, and
the table of gradients [7, C_in] of the normalisation before it (bn_act/ops.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._impl import native_predicate
from nvae_fast.kernels._norm import FOLLOWING, Following
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image

torch.library.define(
    "nvae_fast::pointwise_conv_fwd",
    f"(Tensor x, Tensor? bn, int act, Tensor weight, bool stats, bool means, {FOLLOWING}) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "nvae_fast::pointwise_conv_bwd",
    "(Tensor dy, Tensor? y, Tensor? c, Tensor x, Tensor? bn, int act, Tensor weight, float count=0.) "
    "-> (Tensor, Tensor, Tensor)",
)

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("pointwise_conv", "pointwise_conv_fwd", "pointwise_conv_bwd")


@torch.library.register_fake("nvae_fast::pointwise_conv_fwd")
def _forward_shapes(
    x: Tensor, bn: Tensor | None, act: int, weight: Tensor, stats: bool, means: bool, *following: Any
) -> tuple[Tensor, Tensor, Tensor]:
    n, out = x.shape[0], weight.shape[0]
    y = empty_image(x, n, out, *x.shape[2:])
    found = x.new_empty(Following(*following).rows(stats), out, dtype=torch.float32)
    return y, found, x.new_empty(n if means else 0, out, dtype=torch.float32)


@torch.library.register_fake("nvae_fast::pointwise_conv_bwd")
def _backward_shapes(
    dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int, weight: Tensor, count: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    table = x.new_empty(0 if bn is None else GRADIENTS, x.shape[1], dtype=torch.float32)
    return empty_image(x, *x.shape), weight.new_empty(weight.shape), table
