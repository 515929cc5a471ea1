"""pointwise_conv in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

import torch.nn.functional as tf
from torch import Tensor


def pointwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution without bias; see `api.pointwise_conv`."""
    return tf.conv2d(x, weight)
