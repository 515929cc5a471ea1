"""The model as its publication words it: what the rivals of a benchmark run, and what rewritten modules are tested against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast.cells import DecoderCombiner, EluConv, EncoderCombiner, FactorizedReduce, UpsampleProject
from nvae_fast.layers import WeightNormConv2d


class PlainConv(WeightNormConv2d):
    """Always a convolution."""

    pointwise = False


class PlainElu(EluConv):
    """One module after the other."""

    def forward(self, x: Tensor, *, return_x: bool = False) -> Any:
        y = nn.Sequential.forward(self, x)
        return (y, x) if return_x else y


class PlainReduce(FactorizedReduce):
    """Four strided 1x1 convolutions, concatenated."""

    def forward(self, x: Tensor) -> Tensor:
        a = tf.silu(x)
        convs = (self.conv_1, self.conv_2, self.conv_3, self.conv_4)
        pairs = zip(convs, self.OFFSETS, strict=True)
        return torch.cat([conv(a[:, :, row:, column:]) for conv, (row, column) in pairs], dim=1)


class PlainUpsample(UpsampleProject):
    """Interpolation first."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(tf.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))


class PlainSum(EncoderCombiner):
    """A convolution, then a sum."""

    def forward(self, e: Tensor, h: Tensor, *, return_x: bool = False) -> Any:
        y = e + self.conv(h)
        return (y, h) if return_x else y


class PlainCombiner(DecoderCombiner):
    """One convolution of both, concatenated."""

    def forward(self, h: Tensor, z: Tensor, *, return_stats: bool = False, next_norm: Any = None) -> Any:
        y = self.conv(torch.cat([h, z.to(h.dtype)], dim=1))
        return (y, None) if return_stats else y


PLAIN = {
    WeightNormConv2d: PlainConv,
    FactorizedReduce: PlainReduce,
    UpsampleProject: PlainUpsample,
    EluConv: PlainElu,
    EncoderCombiner: PlainSum,
    DecoderCombiner: PlainCombiner,
}


def plain(model: nn.Module) -> nn.Module:
    """`model` without the rewrites of its modules, in place: the same parameters, the same numbers to rounding."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    for sampler in getattr(model, "enc_sampler", ()):
        sampler.adds_bias = True
    return model
