"""y[n, c, i, j] = sum_{a, b} w[c, a, b] u[n, c, stride i + dilation a - p, stride j + dilation b - p], p = dilation (k - 1)/2,
where u = act(norm(x)), or x without a norm, and 0 outside the image

`impl="auto"` takes "cuda" for CUDA tensors where the extension was built with CUDA, else "triton" where that is installed;
"cpu" for float32 and bfloat16 images on the CPU where its row in `kernels/_auto.py` holds; else "reference".
"""

from __future__ import annotations

from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm_conv
from nvae_fast.kernels._norm import Norm
from nvae_fast.kernels.depthwise_conv import ops, reference

_impl.register("depthwise_conv", cpu=ops.cpu_can_run, cuda=ops.cuda_can_run, triton=ops.triton_can_run)


@_check.typed
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int = 1,
    dilation: int = 1,
    upsample: int = 1,
    norm: Norm | None = None,
    act: str = "identity",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Every channel convolved with a filter of its own, zeros outside the image: nn.Conv2d with groups = C and no bias.

    x [N, C, H, W], any strides; weight [C, 1, k, k], k odd. Returns [N, C, ceil(H / stride), ceil(W / stride)] in the dtype of
    x (under autocast: in autocast's), channels-last from the native implementation, whose arithmetic is float32 throughout.
    Kept for backward: x, the weight and 5 C floats; the normalised tensor is never stored.

    upsample: 2 convolves the image in which every pixel of x stands 2 x 2 times (nearest), which is never stored;
        stride 1 only.
    norm: a `Norm` over C channels, applied to x before the convolution. In training its running statistics move, once.
    act: "identity", "swish" or "elu", behind the norm.
    return_stats: also return mean and biased variance [2, C] of y, without gradient, as `Norm(stats=...)` takes them.
    impl: "auto", "reference", "cpu" (float32 or bfloat16, k up to 11, any strides), "cuda" (float16 too, k up to 27) or
        "triton" (float16 too). The reference alone can be differentiated twice.

    What is not finite in x reaches what it reaches in PyTorch. In the weight, or on its way to the weight's gradient, it stays
    within its channel but may go further there: the zeros around the image are multiplied, too.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    if upsample not in (1, 2) or (upsample == 2 and stride != 1):
        raise ValueError(f"upsample={upsample} with stride={stride}: expected 1, or 2 with stride 1")
    x, weight = _norm_conv.check(x, weight, norm, act, upsample**2)
    if norm is None and act != "identity":
        raise ValueError(f"act {act!r} without norm: pass the normalisation before it, or apply the activation yourself")
    k = weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (x.shape[1], 1, k, k) or k % 2 == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [{x.shape[1]}, 1, k, k] with k odd")
    if stride not in (1, 2) or dilation < 1:
        raise ValueError(f"stride={stride}, dilation={dilation}: expected stride 1 or 2 and a dilation of at least 1")
    impl = _auto.choose("depthwise_conv", impl, [x], [weight], fused=norm is not None or return_stats)
    impl = _impl.resolve_impl("depthwise_conv", impl, x, weight)
    if impl == "reference":
        u = _norm_conv.normalised(reference.upsampled(x, upsample), norm, act)
        y = reference.depthwise_conv(u, weight, stride, dilation)
        return (y, _norm_conv.batch_stats(y)) if return_stats else y
    y, stats = _norm_conv.norm_conv(ops.raw_name(impl), x, weight, norm, act, (stride, dilation, upsample), return_stats)
    return (y, stats) if return_stats else y
