"""y[n, o, i, j] = sum_c w[o, c] a[n, c, i, j] + bias[o] + addend[n, o, i, j], a = act(norm(x)), or act(x) without a norm

`impl="auto"` takes "cpu" for float32 and bfloat16 images on the CPU where its row in `kernels/_auto.py` holds,
"triton" for float32, bfloat16 and float16 images on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm, _norm_conv
from nvae_fast.kernels.pointwise_conv import ops, reference

_impl.register("pointwise_conv", cpu=ops.cpu_can_run, triton=ops.triton_can_run)


@_check.typed
def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: _norm.Norm | None = None,
    act: str = "identity",
    beside: Tensor | None = None,
    addend: Tensor | None = None,
    return_stats: bool = False,
    next_norm: _norm.Norm | None = None,
    return_x: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """A 1x1 convolution with what stands before it, a normalisation and an activation, and behind it, a sum.

    x [N, C, H, W], any strides; weight [C_out, C, 1, 1], bias [C_out] or None. Returns [N, C_out, H, W] in the dtype of x
    (under autocast: in autocast's), channels-last from the native implementations, which sum in float32. Kept for backward: x,
    beside, the weight and 5 C floats; the normalised or activated tensor is never stored.

    norm: a `Norm` over C channels. In training its running statistics move, once.
    act: "identity", "swish" or "elu", behind the norm where there is one.
    beside: [N, C2, H, W], without a norm: the convolution is of cat((x, beside), 1), which is never made, and the weight has
        C + C2 columns.
    addend: [N, C_out, H, W], added to y. Its gradient is y's.
    return_stats: also return mean and biased variance [2, C_out] of y, without gradient, as `Norm(stats=...)` takes them.
    next_norm: the normalisation of y that follows, finished with the statistics, as `se_residual` says.
    return_x: how many others read x too, 2 at most: also return x, for each of them one. The gradients that come back are
        added in the last pass of this backward, which saves the passes of autograd's additions (without a norm, all but one).
    impl: "auto", "reference", "cpu" (float32, bfloat16; `beside` is concatenated) or "triton" (CUDA; float16 too). The
        reference alone can be differentiated twice.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    given = x
    x, weight = _norm_conv.check(x, weight, norm, act)
    channels = x.shape[1]
    if beside is not None:
        if norm is not None:
            raise ValueError("beside with norm: expected one of them; concatenate the two, or normalise x before")
        if beside.dim() != 4 or (beside.shape[0], *beside.shape[2:]) != (x.shape[0], *x.shape[2:]):
            wanted = f"({x.shape[0]}, C2, {x.shape[2]}, {x.shape[3]})"
            raise ValueError(f"beside has shape {tuple(beside.shape)}: expected {wanted}, the images of x")
        channels += beside.shape[1]
    if weight.dim() != 4 or tuple(weight.shape[1:]) != (channels, 1, 1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [C_out, {channels}, 1, 1]")
    shapes = {"bias": weight.shape[:1], "addend": (x.shape[0], weight.shape[0], *x.shape[2:])}
    for (name, shape), t in zip(shapes.items(), (bias, addend), strict=True):
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: expected {tuple(shape)}")
    _norm.check_beside(x, bias=bias, addend=addend, beside=beside)
    readers = _norm.check_readers(return_x)
    if next_norm is not None:
        _norm.check_norm(next_norm, x, weight.shape[0], "y")
        _norm.check_batch(next_norm, x.shape[0] * x.shape[2] * x.shape[3], (x.shape[0], weight.shape[0], *x.shape[2:]))
    bias, addend, beside = (None if t is None else t.to(x.dtype) for t in (bias, addend, beside))
    chosen = resolve(x, weight, impl, fused=norm is not None or return_stats)
    if chosen == "reference":
        other = None if beside is None else _norm_conv.normalised(beside, None, act)
        y = reference.joined(_norm_conv.normalised(x, norm, act), other, weight, bias, addend)
        stats, passed = _norm_conv.batch_stats(y) if return_stats else None, [given] * readers
    else:
        parts, config = ((), None) if norm is None else (_norm.tensors(norm), _norm.config(norm))
        code = _norm.ACTIVATIONS.index(act)
        options = config, code, return_stats, readers, *_norm.following_of(next_norm if return_stats else None)
        y, stats, *passed = ops.PointwiseConv.apply(x, weight, bias, addend, beside, *options, *parts)
        passed = _norm.shared(given, x, passed)
    found = (y, *([stats] if return_stats else ()), *passed)
    return found if len(found) > 1 else y


def resolve(x: Tensor, weight: Tensor, impl: str = "auto", *, fused: bool = False) -> str:
    """The implementation that runs; `fused`: with a norm or statistics."""
    return _impl.resolve_impl("pointwise_conv", _auto.choose("pointwise_conv", impl, [x], [weight], fused=fused), x, weight)
