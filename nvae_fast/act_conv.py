"""BN, activation and a 3x3 convolution, NVAE's residual op, and several of them as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as tf
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.kernels.conv2d.api import fused
from nvae_fast.layers import BatchNormAct2d, WeightNormConv2d
from nvae_fast.layers.conv import same_padding

BN_EPS, BN_MOMENTUM = 1e-5, 0.05


class ActConv(nn.Module):
    """[BN] -> activation -> [nearest x2] -> weight-normalised 3x3 convolution (data-initialised without BN).

    `memory`, which may be set at any time: "fast" keeps what the convolution reads for backward, "balanced" and "low" compute
    it again. Kernels that apply the BN as they read keep nothing more in any mode (`fused`).
    """

    def __init__(self, in_channels: int, out_channels: int, *, act: str, bn: bool, stride: int, dilation: int) -> None:
        super().__init__()
        self.act, self.upsample, self.memory = act, stride == -1, "balanced"
        self.bn = BatchNormAct2d(in_channels, BN_EPS, BN_MOMENTUM, act=act) if bn else None
        self.conv = WeightNormConv2d(in_channels, out_channels, 3, 2 if stride == 2 else 1, same_padding(3, dilation),
                                     dilation, data_init=not bn)  # fmt: skip

    def forward(self, x: Tensor, stats: Tensor | None = None, *, offset: Tensor | None = None, return_x: int = 0) -> Any:
        """`stats`: of x where the op before has returned them, as `functional.Norm` takes them. `offset`: a bias [C] that x
        lacks and the BN takes in, as that says. `return_x`: return (y, x) or (y, x, x), as `functional.conv2d` does."""
        conv = self.conv
        if self.bn is not None and not self.upsample and (self.memory != "fast" or self.fused(x)):
            norm = self.bn.norm._replace(stats=stats, offset=offset)
            return F.conv2d(x, conv.effective_weight(), conv.own_bias(), norm=norm, act=self.act,
                            stride=conv.stride[0], padding=conv.padding[0], dilation=conv.dilation[0],
                            return_x=return_x)  # fmt: skip
        if self.bn is None:
            a, *rest = tf.elu(x), *[x] * return_x
        elif return_x:
            a, *rest = self.bn(x, stats, offset=offset, return_x=return_x)
        else:
            a, *rest = (self.bn(x, stats, offset=offset),)
        if self.upsample:
            a = tf.interpolate(a, scale_factor=2, mode="nearest")
        return (self.conv(a), *rest) if return_x else self.conv(a)

    def fused(self, x: Tensor) -> bool:
        """Whether BN, activation and convolution of such an x are one kernel."""
        conv = self.conv
        return not (self.bn is None or self.upsample or conv.adds_bias) and fused(
            x, conv.weight, conv.stride[0], conv.padding[0], conv.dilation[0]
        )


def chain_of(ops: Sequence[nn.Module], x: Tensor) -> Sequence[nn.Module]:
    """The first of the ops that read x, and those behind it that one op takes together with it."""
    together = 0
    for op in ops:
        if not (isinstance(op, ActConv) and op.act == ops[0].act and op.fused(x)):
            break
        together += 1
    return ops[: together or 1]


def chained(ops: Sequence[ActConv], x: Tensor, stats: Tensor | None = None, *, offset: Tensor | None = None,
            return_means: bool = False, return_x: int = 0) -> Any:  # fmt: skip
    """Such ops as one, with the arguments of `ActConv.forward`. `return_means`: return (y, None, means) as
    `InvertedResidual.branch` does, no normalisation being left to do, and x behind them."""
    offsets = [offset, *(op.conv.bias for op in ops[:-1])]
    norms = [op.bn.norm._replace(offset=bias) for op, bias in zip(ops, offsets, strict=True)]
    norms[0] = norms[0]._replace(stats=stats)
    found = F.preact_branch(x, [op.conv.effective_weight() for op in ops], norms, act=ops[0].act,
                            dilations=[op.conv.dilation[0] for op in ops], return_means=return_means,
                            return_x=return_x)  # fmt: skip
    return (found[0], None, *found[1:]) if return_means else found
