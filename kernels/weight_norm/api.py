"""weight_norm: the effective weights of many normalised (and masked) convolutions at once.

`impl="auto"` takes "cpu" for float32 weights and log_norms on the CPU (measured against the reference: README.md beside
this file), "triton" for float32, bfloat16 and float16 ones on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.kernels import _check, _impl
from nvae_fast.kernels._norm import check_beside
from nvae_fast.kernels.weight_norm import ops, reference

_impl.register("weight_norm", cpu=ops.cpu_can_run, triton=ops.triton_can_run)


@_check.typed
def weight_norm(
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    eps: float = 1e-5,
    impl: str = "auto",
) -> list[Tensor]:
    """w_eff[o] = exp(l[o]) (w m)[o] / (||(w m)[o]|| + eps), per output channel o, for each weight of the list.

    The norm runs over all axes but the first and has no eps inside the root; its gradient is taken as 0 where the
    norm is exactly 0, so that an all-masked channel gives zeros with zero gradients.

    Args:
        weights: tensors [O, ...] of two or more dimensions, any strides.
        log_norms: l, [O, 1, ...] with as many dimensions as its weight.
        masks: m, of the weight's shape and any dtype, or None where there is none; None for no masks at all. They are
            data: one that requires a gradient is refused.
        eps: added to the norm.
        impl: "auto", "reference", "cpu" (float32 weights and log_norms) or "triton" (CUDA; bfloat16 and float16 too). The
            reference alone can be differentiated twice.

    Returns:
        The effective weights, each in the dtype of its weight; the arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: lists of different lengths, shapes or devices that do not match, a mask that requires a gradient.
        RuntimeError: an `impl` that cannot run on these tensors.

    Source: Salimans and Kingma, arXiv 1602.07868, with the norm's logarithm learned (NVAE, arXiv 2007.03898).
    """
    _check.least(eps=eps)
    n = len(weights)
    if len(log_norms) != n or (masks is not None and len(masks) != n):
        counts = f"{n} weights, {len(log_norms)} log_norms, {'no' if masks is None else len(masks)} masks"
        raise ValueError(f"{counts}: expected one of each for every weight; None stands for no mask")
    masks = [None] * n if masks is None else list(masks)
    device = weights[0].device if n else None
    for i, (w, l, m) in enumerate(zip(weights, log_norms, masks, strict=True)):  # noqa: E741 (the formula's name)
        if w.dim() < 2 or not w.is_floating_point():
            raise ValueError(f"weights[{i}] of shape {tuple(w.shape)}: expected floating-point [O, ...] of rank >= 2")
        expected = (w.shape[0],) + (1,) * (w.dim() - 1)
        if l.shape != expected:
            raise ValueError(f"log_norms[{i}] of shape {tuple(l.shape)}: expected {expected}, one per output channel")
        if not (w.device == l.device == device and l.is_floating_point()):
            check_beside(weights[0], called="weights[0]", **{f"weights[{i}]": w, f"log_norms[{i}]": l})
        if m is None:
            continue
        if m.device != device:
            raise ValueError(f"masks[{i}] is on {m.device}: expected {device}, where weights[0] is")
        if m.shape != w.shape:
            raise ValueError(f"masks[{i}] of shape {tuple(m.shape)}: expected the weight's, {tuple(w.shape)}")
        if m.requires_grad:
            raise ValueError(f"masks[{i}] requires a gradient: expected data; multiply a learned factor into the weight")
        masks[i] = m.to(torch.promote_types(w.dtype, torch.float32))
    if not weights:
        return []
    impl = _impl.resolve_impl("weight_norm", impl, *weights, *log_norms, *masks)
    if impl == "reference":
        return reference.weight_norm(weights, log_norms, masks, eps=eps)
    return list(ops.WeightNorm.apply(eps, *weights, *log_norms, *masks))
