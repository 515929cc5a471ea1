"""Convolution, batch normalisation and activation in a row, the convolution taking the statistics on its way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.layers.conv import same_padding
from nvae_fast.layers.norm import BatchNormAct2d
from nvae_fast.layers.shared import effective


class _ConvBNAct(nn.Sequential):
    """(convolution, BatchNormAct2d)"""

    def _run(self, conv: Callable[..., Any], x: Tensor, **options: int) -> Tensor:
        weight, bn = effective(self[0]), self[1]
        if not bn.norm.uses_batch():
            return bn(conv(x, weight, **options))
        y, stats = conv(x, weight, return_stats=True, **options)
        return bn(y, stats)


class DepthwiseConvBNAct(_ConvBNAct):
    """act(BN(conv(x))), conv depthwise k x k with "same" padding and no bias. It replaces nn.Sequential(nn.Conv2d(C, C, k,
    stride, padding, dilation, groups=C, bias=False), nn.BatchNorm2d(C), nn.SiLU()), with its state_dict keys and its numbers.

    Keeps x and the convolution's output for backward, nothing else of their size. `act` is "swish" (SiLU), "elu" or "identity";
    the other arguments are those of the modules.
    """

    def __init__(self, channels: int, kernel_size: int = 5, *, stride: int = 1, dilation: int = 1, act: str = "swish",
                 eps: float = 1e-5, momentum: float | None = 0.1) -> None:  # fmt: skip
        padding = same_padding(kernel_size, dilation)
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size, stride, padding, dilation, groups=channels, bias=False),
            BatchNormAct2d(channels, eps, momentum, act=act),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._run(F.depthwise_conv, x, stride=self[0].stride[0], dilation=self[0].dilation[0])


class PointwiseConvBNAct(_ConvBNAct):
    """act(BN(conv(x))), conv 1x1 without bias. It replaces nn.Sequential(nn.Conv2d(C_in, C_out, 1, bias=False),
    nn.BatchNorm2d(C_out), nn.SiLU()), with its state_dict keys and its numbers.

    Keeps x and the convolution's output for backward, nothing else of their size. `act` is "swish" (SiLU), "elu" or "identity";
    the other arguments are those of the modules.
    """

    def __init__(self, in_channels: int, out_channels: int, *, act: str = "swish", eps: float = 1e-5,
                 momentum: float | None = 0.1) -> None:  # fmt: skip
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 1, bias=False), BatchNormAct2d(out_channels, eps, momentum, act=act)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._run(F.pointwise_conv, x)
