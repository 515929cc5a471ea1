"""power_iteration: the largest singular value of many weights, from singular vectors kept between calls.

`impl="auto"` takes "cpu" for float32 and bfloat16 weights on the CPU (measured against the reference: README.md beside
this file), "triton" for float32, bfloat16 and float16 ones on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nvae_fast.kernels import _check, _impl
from nvae_fast.kernels._norm import check_beside
from nvae_fast.kernels.power_iteration import ops, reference

_impl.register("power_iteration", cpu=ops.cpu_can_run, triton=ops.triton_can_run)


@_check.typed
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
        impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too). The reference alone can be
            differentiated twice.

    Returns:
        sigma [L], and the lists of the new u and v; float32 (float64 where the weight is). With "cpu" and "triton" all u are
        views of one buffer, and all v of another.

    Raises:
        ValueError: no weights, lists of different lengths, shapes or devices that do not match, negative iterations.
        RuntimeError: an `impl` that cannot run.

    Source: Yoshida and Miyato, arXiv 1705.10941; NVAE, arXiv 2007.03898, section 3.2.
    """
    if not weights:
        raise ValueError("weights is empty: expected at least one weight; leave the call out when there is none")
    if not len(weights) == len(u) == len(v):
        raise ValueError(f"{len(weights)} weights, {len(u)} u, {len(v)} v: expected one u and one v for each weight")
    if iterations < 0:
        raise ValueError(f"iterations {iterations}: expected 0 or more")
    _check.least(eps=eps)
    rows, columns, device = [], [], weights[0].device
    for i, (w, left, right) in enumerate(zip(weights, u, v, strict=True)):
        size = w.shape
        if len(size) < 2 or 0 in size or not w.is_floating_point():
            raise ValueError(f"weights[{i}] of shape {tuple(size)}: expected a non-empty [R, ...], 2 or more axes")
        rows.append(size[0])
        columns.append(w.numel() // size[0])
        if left.shape != (rows[i],) or right.shape != (columns[i],):
            raise ValueError(
                f"u[{i}], v[{i}] of shapes {tuple(left.shape)}, {tuple(right.shape)}: expected ({rows[i]},), "
                f"({columns[i]},) for a weight of shape {tuple(size)}"
            )
        if not w.device == left.device == right.device == device:
            check_beside(weights[0], called="weights[0]", **{f"weights[{i}]": w, f"u[{i}]": left, f"v[{i}]": right})
    if _impl.resolve_impl("power_iteration", impl, *weights) == "reference":
        return reference.power_iteration(weights, u, v, iterations=iterations, eps=eps)
    sigma, new_u, new_v = ops.PowerIteration.apply(iterations, eps, *weights, *u, *v)
    return sigma, list(new_u.split(rows)), list(new_v.split(columns))
