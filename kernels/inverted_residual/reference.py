"""inverted_residual in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvae_fast.kernels import _norm_conv
from nvae_fast.kernels._norm import Norm
from nvae_fast.kernels.depthwise_conv.reference import depthwise_conv, upsampled
from nvae_fast.kernels.pointwise_conv.reference import pointwise_conv


def inverted_residual(
    x: Tensor, expand: Tensor, depthwise: Tensor, project: Tensor, norms: Sequence[Norm], *, stride: int, upsample: int
) -> Tensor:
    """BN, 1x1, BN + Swish, k x k depthwise, BN + Swish, 1x1, BN; see `api.inverted_residual`."""
    u = _norm_conv.normalised(upsampled(x, upsample), norms[0], "identity")
    u = _norm_conv.normalised(pointwise_conv(u, expand), norms[1], "swish")
    u = _norm_conv.normalised(depthwise_conv(u, depthwise, stride, 1), norms[2], "swish")
    return _norm_conv.normalised(pointwise_conv(u, project), norms[3], "identity")
