"""y = conv2d(a, weight) + bias, a = act(norm(x)), and chains of it: y = conv2d(act(norm2(conv2d(act(norm1(x)), w1))), w2)

`impl="auto"` takes the implementation that `bn_act` would take of x: with it a is not kept for backward but computed again.
Between "triton"'s passes cuDNN convolves, but where a convolution `ops.fits` Triton's own 3x3 (the row in `kernels/_auto.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

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
    convolution is torch's (oneDNN, cuDNN) or, on a GPU and where `fused` says so, Triton's, in the dtype of x (under autocast:
    in autocast's). Kept for backward: x, the weight and 5 C floats, half of what the modules keep; the price is one more
    elementwise pass over x.

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
    chosen = _impl.resolve_impl("conv2d", impl, x)
    if chosen == "reference":
        y = reference.conv2d(_norm_conv.normalised(x, norm, act), weight, bias, *sizes)
        return (y, *[given] * readers) if readers else y
    if bias is None and _own(chosen, x, weight, *sizes):
        return _chain(given, x, [weight], [norm], act, [dilation], readers)
    code = _norm.ACTIVATIONS.index(act)
    y, *passed = ops.NormConv2d.apply(x, weight, bias, _norm.config(norm), code, sizes, readers, *_norm.tensors(norm))
    return (y, *_norm.shared(given, x, passed)) if readers else y


@_check.typed
def preact_branch(
    x: Tensor,
    weights: Sequence[Tensor],
    norms: Sequence[_norm.Norm],
    *,
    act: str,
    dilations: Sequence[int] | None = None,
    return_means: bool = False,
    return_x: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """[norm -> activation -> convolution], once for each weight: the branch of a residual cell with full pre-activation.

    Args:
        x: [B, C, H, W], any strides.
        weights: [C_out, C_in, k, k] each, k odd, C_in of what comes before. Stride 1, zeros around the activated image, which
            keeps H and W. A bias goes to the `offset` of the norm behind; that of the last one to what reads y.
        norms: of what each convolution reads. In training their running statistics move, once each.
        act: "identity", "swish" or "elu", behind each norm.
        dilations: of each convolution; None: 1.
        return_means: return (y, means), those of y over space [B, C_out], as `se_residual(x_means=...)` takes them, summed
            where y is written. None where `fused` does not hold: they would cost a pass of their own.
        return_x: as of `conv2d`, behind these.
        impl: as of `conv2d`. Where `fused` does not hold, it is `conv2d` once for each weight.

    Returns y [B, C_out, H, W] in the dtype of x (under autocast: in autocast's). Kept for backward: x, what stands between the
    convolutions, the weights and tables.

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.

    Source: He et al., arXiv 1603.05027, figure 4e; Vahdat and Kautz, arXiv 2007.03898, figure 3b.
    """
    given, dilations = x, [1] * len(weights) if dilations is None else dilations
    x, weights = _check_branch(x, weights, norms, act, dilations)
    readers = _norm.check_readers(return_x)
    sizes = [(1, d * (w.shape[2] // 2), d) for w, d in zip(weights, dilations, strict=True)]
    if all([fused(x, w, *s, impl=impl) for w, s in zip(weights, sizes, strict=True)]):
        return _chain(given, x, weights, norms, act, dilations, readers, return_means)
    y, passed = x, []
    for i, (weight, norm, (stride, padding, dilation)) in enumerate(zip(weights, norms, sizes, strict=True)):
        options = dict(norm=norm, act=act, stride=stride, padding=padding, dilation=dilation, impl=impl)
        y = conv2d(y, weight, **options, return_x=0 if i else readers)
        if readers and not i:
            y, *passed = y
    found = (y, *([None] if return_means else ()), *_norm.shared(given, x, passed))
    return found if len(found) > 1 else y


def fused(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 1, dilation: int = 1, *, impl: str = "auto") -> bool:
    """Whether Triton's own 3x3 runs, where there is no bias: act(norm(x)) is then applied on the way in, and there is nothing
    that could be kept of it. Autocast does not matter: it makes of types that fit others that do."""
    impl = _auto.choose("conv2d", impl, [x], [weight], fused=True)
    return _own(_impl.resolve_impl("conv2d", impl, x), x, weight, stride, padding, dilation)


def _own(chosen: str, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int) -> bool:
    """The same of an implementation that is chosen already."""
    return chosen == "triton" and "conv2d" in _auto.TRITON and ops.fits(x, weight, stride, padding, dilation) is None


def _chain(given: Tensor, x: Tensor, weights: Sequence[Tensor], norms: Sequence[_norm.Norm], act: str,
           dilations: Sequence[int], readers: int, means: bool = False) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """y, with `means` those, and with `readers` x as `given`, of the chain that the kernels run."""
    settings = tuple(_norm.config(n) for n in norms), _norm.ACTIVATIONS.index(act), tuple(dilations), means, readers
    y, pooled, *passed = ops.PreactBranch.apply(x, *settings, *weights, *(t for n in norms for t in _norm.tensors(n)))
    found = (y, *([pooled] if means else ()), *_norm.shared(given, x, passed))
    return found if len(found) > 1 else y


def _check_branch(
    x: Tensor, weights: Sequence[Tensor], norms: Sequence[_norm.Norm], act: str, dilations: Sequence[int]
) -> tuple[Tensor, Sequence[Tensor]]:
    """x and the weights as autocast would have them; raises in one line where arguments do not fit together."""
    if not len(weights) == len(norms) == len(dilations) or not len(weights):
        found = f"{len(weights)} weights, {len(norms)} norms, {len(dilations)} dilations"
        raise ValueError(f"{found}: expected as many of each, 1 at least")
    x, first = _norm_conv.check(x, weights[0], norms[0], act)
    channels, values = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3]
    for i, (weight, norm, dilation) in enumerate(zip(weights, norms, dilations, strict=True)):
        k = weight.shape[-1] if weight.dim() == 4 else 0
        if k % 2 == 0 or tuple(weight.shape[1:]) != (channels, k, k):
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}: expected [C_out, {channels}, k, k] with k odd")
        if dilation < 1:
            raise ValueError(f"dilations[{i}] is {dilation}: expected a whole number of at least 1")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights[{i}] is {weight.dtype}: expected {weights[0].dtype}, as weights[0]; convert it with .to")
        _norm.check_beside(x, **{f"weights[{i}]": weight})
        _norm.check_norm(norm, x, channels, f"weights[{i - 1}]" if i else "x")
        _norm.check_batch(norm, values, x.shape)
        channels = weight.shape[0]
    return x, [first, *_norm.autocast(x, *weights[1:])[1:]]
