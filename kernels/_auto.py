"""Which implementation `impl="auto"` takes where there is a choice, and why; decided once, never while a program runs.

On the CPU: one row per op for which "the C++ wherever it can run" is not the answer, from measurements (`nvae-fast bench
--suite ops`). On CUDA nothing was measured yet: auto takes the fused kernels of an op wherever they can run, where there are
two kinds those of the tables below. `python -m nvae_fast.env` prints both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nvae_fast.kernels import _impl


class Wins(NamedTuple):
    """Conditions, all of which must hold beside what the implementation's predicate asks, and the measurement behind them."""

    why: str
    channels_last: bool = True
    gradient: bool = False  # something requires a gradient, or more than the op's plain self is asked for
    fused: bool = False  # more than the op's plain self is asked for: a norm before it, statistics behind it


CPU = {
    "bn_act": Wins("channels-last: 1.1 to 1.4 times PyTorch's speed; NCHW would be copied first"),
    "conv2d": Wins("channels-last: as bn_act, and half the memory"),
    "depthwise_conv": Wins(
        "channels-last with a gradient or a norm: 2.7 to 3.5 times; its plain forward alone 0.2 to 0.9", gradient=True
    ),
    "inverted_residual": Wins("channels-last: 1.7 to 3 times"),
    "pointwise_conv": Wins("channels-last with a norm or statistics; plain it is 0.75 to 1.25 times", fused=True),
    "se_residual": Wins("channels-last with a gradient or a norm: 1.7 times; its plain forward alone 0.4", gradient=True),
}

_ONE_LAUNCH = (
    "predicted, not measured: one launch each way, the activation applied once into a tile in shared memory, both gradients "
    "from one tile; Triton's kernels store the activated image, 2 more passes and launches, and read it once for every tap"
)
TRITON = {  # instead of cuDNN, where its kernels fit
    "conv2d": Wins(
        "predicted, not measured: its own 3x3 of stride 1 activates on the way in and sums on the way out, which leaves out 8 "
        "of 15 launches and 10 of 31 images read or written of a cell's branch; cuDNN pads channels that are no multiples of 8"
    ),
}
CUDA = {  # before Triton, where the extension was built with CUDA: as the ops are registered
    "depthwise_conv": Wins(_ONE_LAUNCH),
    "inverted_residual": Wins("its depthwise convolution: " + _ONE_LAUNCH),
}


def choose(op: str, impl: str, images: Sequence[Tensor], others: Sequence[Tensor] = (), *, fused: bool = False) -> str:
    """`impl`, or what auto becomes where the table's row does not hold for these images (and other tensors that may need
    gradients)."""
    if impl != "auto" or images[0].device.type != "cpu" or _impl.transformed():
        return impl
    rule = CPU[op]
    wins = not rule.channels_last or all(t.is_contiguous(memory_format=torch.channels_last) for t in images)
    if not fused:
        needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (*images, *others))
        wins = wins and not rule.fused and (not rule.gradient or needs_gradient)
    return impl if wins else _impl.unless_chosen(op)
