"""The inverted residual (MBConv) branch of NVAE's cells."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.errors import InputError
from nvae_fast.kernels.inverted_residual import MEMORY
from nvae_fast.kernels.inverted_residual.api import outputs
from nvae_fast.layers.conv import same_padding
from nvae_fast.layers.norm import BatchNormAct2d
from nvae_fast.layers.shared import effective


class InvertedResidual(nn.Module):
    """[nearest x2] -> BN -> 1x1 (Cin -> E Cin) -> BN + Swish -> k x k depthwise -> BN + Swish -> 1x1 (-> Cout) -> BN.

    `stride` 1 keeps, 2 halves and -1 doubles the resolution. `groups` 0 means depthwise, any other number grouped
    convolution. No bias, no weight normalisation, no skip connection: NVAE's `mconv_e{E}k{k}g{g}`.

    `memory`, which may be set at any time, is what the fused branch keeps for backward: "fast" and "balanced" 14 times x (for
    E = 6 and stride 1), "low" 2 times x at the price of computing the first two convolutions again.
    """

    def __init__(self, in_channels: int, out_channels: int, *, expansion: float = 6, kernel_size: int = 5, stride: int = 1,
                 groups: int = 0, eps: float = 1e-5, momentum: float = 0.05, memory: str = "balanced") -> None:  # fmt: skip
        super().__init__()
        if stride not in (-1, 1, 2):
            raise InputError(f"stride={stride} of an inverted residual must be 1, 2 or -1 (up-sampling)")
        if memory not in MEMORY:
            raise InputError(f"memory='{memory}': expected one of {', '.join(MEMORY)}")
        hidden = round(in_channels * expansion)
        if groups and hidden % groups:
            raise InputError(
                f"hidden width {hidden} = {in_channels} * {expansion} must be a multiple of groups={groups}: "
                f"use a width that is, or another arch_instance"
            )
        self.upsample, self.memory = stride == -1, memory
        bn = {"eps": eps, "momentum": momentum}
        self.bn_in = BatchNormAct2d(in_channels, act="identity", **bn)
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn_expand = BatchNormAct2d(hidden, act="swish", **bn)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size, 2 if stride == 2 else 1, same_padding(kernel_size),
                                   groups=groups or hidden, bias=False)  # fmt: skip
        self.bn_depthwise = BatchNormAct2d(hidden, act="swish", **bn)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn_out = BatchNormAct2d(out_channels, act="identity", **bn)

    def forward(self, x: Tensor, stats: Tensor | None = None, **options: int) -> Any:
        return self.branch(x, stats, defer=False, **options)

    def branch(self, x: Tensor, stats: Tensor | None = None, *, defer: bool = True, return_means: bool = False,
               return_x: int = 0) -> Any:  # fmt: skip
        """(t, bn): the output with its last normalisation still to be done by `functional.se_residual(bn=...)`,
        or (y, None). `stats`: of x where the op before has returned them, as `functional.Norm` takes them. `return_means`:
        (t, bn, means), and `return_x`: x behind them, both as `functional.inverted_residual` returns them."""
        if self.depthwise.groups != self.depthwise.in_channels:
            y = self._grouped(x, stats)
            return outputs(y, (None, None)[: defer + return_means], [x] * return_x)
        norms = [bn.norm for bn in (self.bn_in, self.bn_expand, self.bn_depthwise, self.bn_out)]
        norms[0] = norms[0]._replace(stats=stats)
        return F.inverted_residual(
            x, *map(effective, (self.expand, self.depthwise, self.project)), norms, stride=self.depthwise.stride[0],
            upsample=2 if self.upsample else 1, memory=self.memory, defer=defer, return_means=return_means, return_x=return_x,
        )  # fmt: skip

    def _grouped(self, x: Tensor, stats: Tensor | None) -> Tensor:
        if self.upsample:
            x = tf.interpolate(x, scale_factor=2, mode="nearest")
        x = self.bn_in(x, stats)
        for conv, bn in ((self.expand, self.bn_expand), (self.depthwise, self.bn_depthwise), (self.project, self.bn_out)):
            x = bn(conv._conv_forward(x, effective(conv), None))
        return x
