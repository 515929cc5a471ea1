"""se_residual: squeeze-excitation of a branch, its scaling and the residual sum, in one op.

`impl="auto"` takes "cpu" for float32 and bfloat16 images on the CPU (skip and x alike) where its row in
`kernels/_auto.py` holds, "triton" for float32, bfloat16 and float16 images on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm
from nvae_fast.kernels.bn_act.ops import ApplyNorm
from nvae_fast.kernels.se_residual import ops, reference

_impl.register("se_residual", triton=ops.triton_can_run, cpu=ops.cpu_can_run)


@_check.typed
def se_residual(
    skip: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *,
    residual_scale: float = 0.1,
    bn: Tensor | None = None,
    bias: Tensor | None = None,
    x_means: Tensor | None = None,
    return_stats: bool = False,
    next_norm: _norm.Norm | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor | None]:
    """y = skip + residual_scale * x * sigmoid(w2 relu(w1 mean_hw(x) + b1) + b2), the gate per image and channel.

    With w1, b1, w2 and b2 all None there is no gate: y = skip + residual_scale * x.

    Args:
        skip, x: [B, C, H, W], any strides. y has their dtype (the wider one when they differ); the arithmetic is
            float32 (float64 for float64).
        w1, b1: [H, C], [H]: the linear layer from the C means to H hidden units.
        w2, b2: [C, H], [C]: the linear layer back.
        residual_scale: weight of the branch.
        bn: the normalisation of x that `inverted_residual(..., defer=True)` left to do, applied here on the way in. x is the
            whole of what it returned, whose statistics bn has.
        bias: [C], of x: x + bias stands for x above, as behind a convolution that leaves its bias to be added here, where it
            costs no pass. Its gradient comes from the sums that are taken anyway. Not beside bn, which has one.
        x_means: the means over space [B, C] of x, float32, where the op before has returned them (`inverted_residual(...,
            return_means=True)`), so that they are not taken again; of x as given, without bn and bias. They carry no gradient,
            being a function of x that the backward accounts for. The reference takes its own.
        return_stats: also return mean and biased variance [2, C] of y, without gradient, as `Norm(stats=...)` takes them; None
            where they would cost a pass of their own (the reference).
        next_norm: the normalisation of y that follows, which is then finished where the statistics are taken: beside y comes
            what the one op that has it before it takes as `next_norm._replace(stats=...)`. A table [5, C]: the running
            statistics are moved here and not by that op. Or what `return_stats` gives, and they are not, where more is to be
            done first: where batches of several processes are joined, or all batches averaged.
        impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too). The reference alone can be
            differentiated twice.

    Raises:
        ValueError: shapes that do not match, or some but not all of the four gate tensors.

    Source: Hu et al., arXiv 1709.01507; NVAE, arXiv 2007.03898, figure 3.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected a floating-point [B, C, H, W]")
    if skip.shape != x.shape:
        raise ValueError(f"skip of shape {tuple(skip.shape)}: expected the shape of x, {tuple(x.shape)}")
    gate = {"w1": w1, "b1": b1, "w2": w2, "b2": b2}
    absent = [name for name, t in gate.items() if t is None]
    if absent and len(absent) < 4:
        raise ValueError(f"{', '.join(absent)} is None: expected all of w1, b1, w2, b2, or none of them for no gate")
    _norm.check_beside(x, skip=skip, **gate, bn=bn, bias=bias, x_means=x_means)
    if bias is not None and bn is not None:
        raise ValueError("bias beside bn: expected one of them; a normalisation has a bias of its own")
    if bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias of shape {tuple(bias.shape)}: expected ({x.shape[1]},), the channels of x")
    if not absent:
        channels, hidden = x.shape[1], w1.shape[0] if w1.dim() else 0
        if not hidden:
            raise ValueError(f"w1 of shape {tuple(w1.shape)}: expected (H, {channels}) with at least one hidden unit")
        shapes = {"w1": (hidden, channels), "b1": (hidden,), "w2": (channels, hidden), "b2": (channels,)}
        for name, shape in shapes.items():
            if gate[name].shape != shape:
                raise ValueError(f"{name} of shape {tuple(gate[name].shape)}: expected {shape} for {channels} channels")
    if bn is not None and (bn.shape != (5, x.shape[1]) or bn.dtype != torch.float32):
        raise ValueError(
            f"bn of shape {tuple(bn.shape)} and {bn.dtype}: expected float32 (5, {x.shape[1]}), as inverted_residual returns it"
        )
    if x_means is not None and (x_means.shape != x.shape[:2] or x_means.dtype != torch.float32):
        raise ValueError(
            f"x_means of shape {tuple(x_means.shape)} and {x_means.dtype}: expected float32 {tuple(x.shape[:2])}, images and "
            f"channels of x"
        )
    if next_norm is not None:
        _norm.check_norm(next_norm, x, x.shape[1], "y")
        _norm.check_batch(next_norm, x.numel() // max(x.shape[1], 1), x.shape)
        return_stats = True
    if skip.dtype != x.dtype and impl == "auto":
        impl = _impl.unless_chosen("se_residual")
    impl = _auto.choose("se_residual", impl, [skip, x], [t for t in (w1, bias) if t is not None], fused=bn is not None)
    impl = _impl.resolve_impl("se_residual", impl, skip, x)
    if impl == "reference":
        x = x if bn is None else ApplyNorm.apply(x, bn)
        y = reference.se_residual(skip, x, w1, b1, w2, b2, residual_scale=residual_scale, bias=bias)
        return (y, None) if return_stats else y
    dtype = torch.promote_types(skip.dtype, x.dtype)
    w1, b1, w2, b2, bias = (None if t is None else t.float() for t in (w1, b1, w2, b2, bias))
    before = bn if bias is None else bias
    settings = residual_scale, impl == "triton", return_stats, *_norm.following_of(next_norm)
    y, stats = ops.SEResidual.apply(skip.to(dtype), x.to(dtype), before, w1, b1, w2, b2, x_means, *settings)
    return (y, stats) if return_stats else y
