"""weight_norm: the effective weights of many normalised (and masked) convolutions at once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.weight_norm import reference

_impl.register("weight_norm")


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
        masks: m, of the weight's shape, or None where there is none; None for no masks at all.
        eps: added to the norm.

    Returns:
        The effective weights, each in the dtype of its weight; the arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: lists of different lengths, or shapes that do not match.

    Source: Salimans and Kingma, arXiv 1602.07868, with the norm's logarithm learned (NVAE, arXiv 2007.03898).
    """
    if len(log_norms) != len(weights) or (masks is not None and len(masks) != len(weights)):
        counts = f"{len(weights)} weights, {len(log_norms)} log_norms, {'no' if masks is None else len(masks)} masks"
        raise ValueError(f"{counts}: expected one of each for every weight; None stands for no mask")
    for i, (w, l) in enumerate(zip(weights, log_norms, strict=True)):  # noqa: E741 (the formula's name)
        if w.dim() < 2 or not w.is_floating_point():
            raise ValueError(f"weights[{i}] of shape {tuple(w.shape)}: expected floating-point [O, ...] of rank >= 2")
        expected = (w.shape[0],) + (1,) * (w.dim() - 1)
        if l.shape != expected:
            raise ValueError(f"log_norms[{i}] of shape {tuple(l.shape)}: expected {expected}, one per output channel")
        if masks is not None and masks[i] is not None and masks[i].shape != w.shape:
            raise ValueError(f"masks[{i}] of shape {tuple(masks[i].shape)}: expected the weight's, {tuple(w.shape)}")
    if not weights:
        return []
    _impl.resolve_impl("weight_norm", impl, *weights, *log_norms)
    return reference.weight_norm(weights, log_norms, masks, eps=eps)
