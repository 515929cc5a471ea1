"""y[n, o, i, j] = sum_c w[o, c] a[n, c, i, j], a = act(norm(x)), or x without a norm

`impl="auto"` takes "cpu" for float32 and bfloat16 images on the CPU where its row in `kernels/_auto.py` holds,
"triton" for float32, bfloat16 and float16 images on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm_conv
from nvae_fast.kernels._norm import Norm
from nvae_fast.kernels.pointwise_conv import ops, reference

_impl.register("pointwise_conv", cpu=ops.cpu_can_run, triton=ops.triton_can_run)


@_check.typed
def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    *,
    norm: Norm | None = None,
    act: str = "identity",
    return_stats: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A 1x1 convolution without bias, with the batch normalisation and the activation before it where `norm` is given.

    x [N, C, H, W], any strides; weight [C_out, C, 1, 1]. Returns [N, C_out, H, W] in the dtype of x (under autocast: in
    autocast's), channels-last from the native implementations, which sum in float32. Kept for backward: x, the weight and 5 C
    floats; the normalised tensor is never stored.

    norm: a `Norm` over C channels. In training its running statistics move, once.
    act: "identity", "swish" or "elu", behind the norm.
    return_stats: also return mean and biased variance [2, C_out] of y, without gradient, as `Norm(stats=...)` takes them.
    impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too). The reference alone can be
        differentiated twice.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    x, weight = _norm_conv.check(x, weight, norm, act)
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [C_out, {x.shape[1]}, 1, 1]")
    impl = _auto.choose("pointwise_conv", impl, [x], [weight], fused=norm is not None or return_stats)
    if _impl.resolve_impl("pointwise_conv", impl, x, weight) == "reference":
        y = reference.pointwise_conv(_norm_conv.normalised(x, norm, act), weight)
        return (y, _norm_conv.batch_stats(y)) if return_stats else y
    y, stats = _norm_conv.norm_conv("pointwise_conv", x, weight, norm, act, (), return_stats)
    return (y, stats) if return_stats else y
