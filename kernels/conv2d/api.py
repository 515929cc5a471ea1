"""y = conv2d(a, weight) + bias, a = act(norm(x))

`impl="auto"` takes the implementation that `bn_act` would take of x: with it a is not kept for backward but computed again.
"""

from __future__ import annotations

from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm, _norm_conv
from nvae_fast.kernels.bn_act import ops as bn_act_ops
from nvae_fast.kernels.conv2d import ops, reference

_impl.register("conv2d", triton=bn_act_ops.triton_can_run, cpu=bn_act_ops.cpu_can_run)


@_check.typed
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: _norm.Norm,
    act: str = "identity",
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    return_x: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """A dense convolution behind a batch normalisation and an activation, which are not kept but computed again in backward.

    x [N, C, H, W], any strides; weight [C_out, C, k, k], bias [C_out] or None. Zeros are padded around a = act(norm(x)). The
    convolution is torch's (oneDNN, cuDNN) in the dtype of x (under autocast: in autocast's). Kept for backward: x, the weight
    and 5 C floats, half of what the modules keep; the price is one more elementwise pass over x.

    norm: a `Norm` over C channels. In training its running statistics move, once.
    act: "identity", "swish" or "elu".
    return_x: how many others read x too (a skip connection, a latent group), 2 at most: return (y, x) or (y, x, x), for each of
        them one. The gradients that come back to them are added in the last pass of this backward, which saves the passes of
        autograd's additions.
    impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too), of the normalisation. The reference
        keeps a, and alone can be differentiated twice.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    given = x
    x, weight = _norm_conv.check(x, weight, norm, act)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected [C_out, {x.shape[1]}, k, k]")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: expected {tuple(weight.shape[:1])}")
        _norm.check_beside(x, bias=bias)
        bias = bias.to(weight.dtype)
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if value < least:
            raise ValueError(f"{name} {value}: expected an integer of at least {least}, for both axes")
    sizes, readers = (stride, padding, dilation), _norm.check_readers(return_x)
    impl = _auto.choose("conv2d", impl, [x], [weight], fused=True)
    if _impl.resolve_impl("conv2d", impl, x) == "reference":
        y = reference.conv2d(_norm_conv.normalised(x, norm, act), weight, bias, *sizes)
        return (y, *[given] * readers) if readers else y
    code = _norm.ACTIVATIONS.index(act)
    y, *passed = ops.NormConv2d.apply(x, weight, bias, _norm.config(norm), code, sizes, readers, *_norm.tensors(norm))
    return (y, *_norm.shared(given, x, passed)) if readers else y
