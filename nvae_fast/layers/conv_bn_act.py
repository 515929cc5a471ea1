"""Convolution, batch normalisation and activation in a row, the convolution taking the statistics on its way out."""

from __future__ import annotations

from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.layers.conv import same_padding
from nvae_fast.layers.norm import BatchNormAct2d


class DepthwiseConvBNAct(nn.Sequential):
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
        conv, bn = self
        if not bn.norm.uses_batch:
            return bn(F.depthwise_conv(x, conv.weight, stride=conv.stride[0], dilation=conv.dilation[0]))
        y, stats = F.depthwise_conv(x, conv.weight, stride=conv.stride[0], dilation=conv.dilation[0], return_stats=True)
        return bn(y, stats)


class PointwiseConvBNAct(nn.Sequential):
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
        conv, bn = self
        if not bn.norm.uses_batch:
            return bn(F.pointwise_conv(x, conv.weight))
        y, stats = F.pointwise_conv(x, conv.weight, return_stats=True)
        return bn(y, stats)
