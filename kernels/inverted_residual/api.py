"""y = BN3(P a(BN2(D a(BN1(E BN0(x)))))): NVAE's cell branch. E and P are 1x1 convolutions, D is depthwise k x k, a is Swish.

`impl="auto"` takes "cpu" for float32 and bfloat16 images on the CPU where its row in `kernels/_auto.py` holds,
for float32, bfloat16 and float16 images on CUDA "cuda" where the extension was built with CUDA and Triton is installed, else
"triton" where that is, else "reference".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm
from nvae_fast.kernels._norm import Norm
from nvae_fast.kernels.bn_act.ops import ApplyNorm
from nvae_fast.kernels.inverted_residual import ops, reference

MEMORY = ("fast", "balanced", "low")

_impl.register("inverted_residual", cpu=ops.cpu_can_run, cuda=ops.cuda_can_run, triton=ops.triton_can_run)


@_check.typed
def inverted_residual(
    x: Tensor,
    expand: Tensor,
    depthwise: Tensor,
    project: Tensor,
    norms: Sequence[Norm],
    *,
    stride: int = 1,
    upsample: int = 1,
    memory: str = "balanced",
    defer: bool = False,
    return_means: bool = False,
    return_x: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor | None, ...]:
    """[nearest x2] -> BN -> 1x1 -> BN + Swish -> depthwise k x k -> BN + Swish -> 1x1 -> BN, without biases.

    Args:
        x: [B, C, H, W], any strides.
        expand: [E, C, 1, 1]; depthwise: [E, 1, k, k], k odd; project: [O, E, 1, 1].
        norms: the four normalisations, over C, E, E and O channels. In training their running statistics move, once each and in
            every memory mode.
        stride: 1 or 2, of the depthwise convolution.
        upsample: 2 doubles H and W before everything else (stride 1 only); 1 does not.
        memory: what is kept for backward, in units of B C H W values, for E = 6 C and stride 1. "fast" and "balanced": x and
            the three convolutions' outputs (14). "low": x and the last output (2; the others are computed again). The
            reference keeps what autograd keeps, about 40.
        defer: return (t, bn) with the last normalisation still to be applied, as `se_residual(bn=...)` does; bn is None where t
            is y already (the reference).
        return_means: with `defer`, return (t, bn, means): those of t over space [B, O], as `se_residual(x_means=...)` takes
            them, summed where t is written. None where they would cost a pass of their own (the reference).
        return_x: how many others read x too (a skip connection, a latent group), 2 at most: return x as well, for each of them
            one, as the last: (y, x) or (t, bn, x). The gradients that come back to them are added in the last pass of this
            backward, which saves autograd's additions.
        impl: "auto", "reference", "cpu" (float32, bfloat16, k up to 11), "triton" (CUDA; float16 too) or "cuda" (the depthwise
            stage in CUDA C++, k up to 27, the others in Triton). The reference alone can be differentiated twice.

    Returns y [B, O, H', W'] in the dtype of x (under autocast: in autocast's).

    Raises ValueError or TypeError for arguments that do not fit together, RuntimeError for an `impl` that cannot run.

    Source: Vahdat and Kautz, arXiv 2007.03898, figure 3a; Sandler et al., arXiv 1801.04381.
    """
    weights = {"expand": expand, "depthwise": depthwise, "project": project}
    _check(x, weights, norms, stride, upsample, memory)
    given, readers = x, _norm.check_readers(return_x)
    if return_means and not defer:
        raise ValueError("return_means without defer: expected both; the means are of t, before the last normalisation")
    x, expand, depthwise, project = _norm.autocast(x, *weights.values())
    for name, t in zip(weights, (expand, depthwise, project), strict=True):
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(
                f"x is {x.dtype} on {x.device}, {name} {t.dtype} on {t.device}: they must be alike; convert one with .to"
            )
    impl = _auto.choose("inverted_residual", impl, [x])
    impl = _impl.resolve_impl("inverted_residual", impl, x, depthwise)
    if impl == "reference":
        y = reference.inverted_residual(x, expand, depthwise, project, norms, stride=stride, upsample=upsample)
        return outputs(y, (None, None)[: defer + return_means], [given] * readers)
    parts = [t for norm in norms for t in _norm.tensors(norm)]
    configs = tuple(_norm.config(norm, copies) for norm, copies in zip(norms, (upsample**2, upsample**2, 1, 1), strict=True))
    settings = configs, stride, upsample, memory == "low", impl, return_means, readers
    t3, bn3, means, *passed = ops.InvertedResidual.apply(x, expand, depthwise, project, *settings, *parts)
    y = t3 if defer else ApplyNorm.apply(t3, bn3)
    return outputs(y, (bn3, means)[: defer + return_means], _norm.shared(given, x, passed))


def outputs(y: Tensor, behind: Sequence[Tensor | None], passed: Sequence[Tensor]) -> Any:
    """y, what the caller wants to know of it, and x as it was handed on."""
    found = (y, *behind, *passed)
    return found if len(found) > 1 else y


def _check(x: Tensor, weights: dict[str, Tensor], norms: Sequence[Norm], stride: int, upsample: int, memory: str) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected a floating-point [B, C, H, W]")
    for name, t in weights.items():
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(t.shape)}: expected the 4 dimensions of a convolution's weight")
    channels, hidden, out = x.shape[1], weights["expand"].shape[0], weights["project"].shape[0]
    k = weights["depthwise"].shape[-1]
    shapes = {"expand": (hidden, channels, 1, 1), "depthwise": (hidden, 1, k, k), "project": (out, hidden, 1, 1)}
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}: expected {shape} for x of {channels} channels")
    if k % 2 == 0:
        raise ValueError(f"depthwise has a kernel of {k} x {k}: expected an odd size")
    if stride not in (1, 2) or upsample not in (1, 2) or stride * upsample == 4:
        raise ValueError(f"stride={stride}, upsample={upsample}: expected 1 or 2, and not both 2")
    if memory not in MEMORY:
        raise ValueError(f"memory {memory!r}: expected one of {', '.join(MEMORY)}")
    if len(norms) != 4:
        raise ValueError(f"{len(norms)} norms: expected 4, before and behind the three convolutions")
    before = x.shape[0] * x.shape[2] * x.shape[3] * upsample**2
    behind = x.shape[0] * -(-x.shape[2] // 2) * -(-x.shape[3] // 2) if stride == 2 else before
    seen = zip(norms, (channels, hidden, hidden, out), ("x", *weights), (before, before, behind, behind), strict=True)
    for norm, width, name, values in seen:
        _norm.check_norm(norm, x, width, name)
        _norm.check_batch(norm, values, x.shape)
