"""y[n, c, i, j] = sum_{a, b} w[c, a, b] x[n, c, stride i + dilation a - p, stride j + dilation b - p], p = dilation (k - 1)/2

`impl="auto"` takes "cpu" for channels-last float32 and bfloat16 tensors on the CPU that need a gradient, else "reference": the
native backward wins more than the native forward loses, and a forward alone is faster in PyTorch (README.md beside this file).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.depthwise_conv import ops, reference

_impl.register("depthwise_conv", cpu=ops.cpu_can_run)


def depthwise_conv(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1, impl: str = "auto") -> Tensor:
    """Every channel convolved with a filter of its own, zeros outside the image: nn.Conv2d with groups = C and no bias.

    x [N, C, H, W], any strides; weight [C, 1, k, k], k odd. Returns [N, C, ceil(H / stride), ceil(W / stride)] in the dtype of
    x (under autocast: in autocast's), channels-last from the native implementation, whose arithmetic is float32 throughout.

    impl: "auto", "reference" or "cpu" (float32 or bfloat16, k up to 11, any strides). The reference alone can be differentiated
        twice.

    Raises ValueError or TypeError for tensors that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}: expected [N, C, H, W]")
    k = weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (x.shape[1], 1, k, k) or k % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [{x.shape[1]}, 1, k, k] with k odd")
    if stride not in (1, 2) or dilation < 1:
        raise ValueError(f"stride={stride}, dilation={dilation}: expected stride 1 or 2 and a dilation of at least 1")
    for name, t in (("x", x), ("weight", weight)):
        if not t.is_floating_point():
            raise TypeError(f"{name} is {t.dtype}: expected a floating-point tensor")
    if torch.is_autocast_enabled(x.device.type):
        x, weight = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, weight))
    if x.dtype != weight.dtype or x.device != weight.device:
        raise TypeError(f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}: they must be alike")
    if _impl.resolve_impl("depthwise_conv", _auto(x, weight, impl), x, weight) == "reference":
        return reference.depthwise_conv(x, weight, stride, dilation)
    return ops.DepthwiseConv.apply(x, weight, stride, dilation)


def _auto(x: Tensor, weight: Tensor, impl: str) -> str:
    """The rule of auto that the tensors' types do not tell."""
    if impl != "auto" or x.device.type != "cpu":
        return impl
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return impl if needs_gradient and x.is_contiguous(memory_format=torch.channels_last) else "reference"
