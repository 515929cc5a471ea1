"""power_iteration: the largest singular value of many weights, from singular vectors kept between calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.power_iteration import reference

_impl.register("power_iteration")


def power_iteration(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    iterations: int,
    eps: float = 1e-3,
    impl: str = "auto",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """sigma_i = u_i^T W_i v_i after `iterations` times: v <- unit(W^T u), u <- unit(W v); unit(a) = a / max(|a|, eps).

    W_i is weights[i] seen as a matrix of R = shape[0] rows and K columns (the rest). Only W is differentiated:
    d sigma_i / d W_i = u_i v_i^T, with the new u and v.

    Args:
        weights: L tensors of two or more axes, any strides, on one device.
        u, v: L vectors [R] and [K], the start; v counts only for iterations = 0. They are not modified.
        iterations: rounds of the two updates, 0 or more.
        eps: smallest norm that a vector is divided by.

    Returns:
        sigma [L], and the lists of the new u and v; float32 (float64 where the weight is).

    Raises:
        ValueError: no weights, lists of different lengths, shapes that do not match, negative iterations.

    Source: Yoshida and Miyato, arXiv 1705.10941; NVAE, arXiv 2007.03898, section 3.2.
    """
    if not weights:
        raise ValueError("weights is empty: expected at least one weight; leave the call out when there is none")
    if not len(weights) == len(u) == len(v):
        raise ValueError(f"{len(weights)} weights, {len(u)} u, {len(v)} v: expected one u and one v for each weight")
    if iterations < 0:
        raise ValueError(f"iterations {iterations}: expected 0 or more")
    for i, w in enumerate(weights):
        if w.dim() < 2 or not w.is_floating_point() or w.numel() == 0:
            raise ValueError(f"weights[{i}] of shape {tuple(w.shape)}: expected a non-empty [R, ...], 2 or more axes")
        rows, columns = w.shape[0], w.numel() // w.shape[0]
        if u[i].shape != (rows,) or v[i].shape != (columns,):
            raise ValueError(
                f"u[{i}], v[{i}] of shapes {tuple(u[i].shape)}, {tuple(v[i].shape)}: expected ({rows},), ({columns},) "
                f"for a weight of shape {tuple(w.shape)}"
            )
    _impl.resolve_impl("power_iteration", impl, *weights)
    return reference.power_iteration(weights, u, v, iterations=iterations, eps=eps)
