"""pointwise_conv on a GPU: kernels, then launchers. Images are rows of pixels: x [M, K], y [M, N], with weight [N, K].

Products of tiles, summed in float32. What stands before one (a normalisation with its activation, or the backward of the
normalisation behind y) is applied to the operand in registers and rounded to the storage type, as autocast rounds what a
convolution reads. Sums over rows are taken by tiles, or by tasks of CHUNK rows, and joined in float64 by the last of them
(kernels/_join.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import NO_JOIN, join, join_tiles, joined_stats
from nvae_fast.kernels._norm import Following
from nvae_fast.kernels._tile import load_row, load_rows, multiple, offset_of, store_row, store_rows
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.bn_act.tables import following, share, store_stats, zero_stats
from nvae_fast.kernels.pointwise_conv._backward import pointwise_conv_bwd_kernel
from nvae_fast.kernels.pointwise_conv._device import add_product, store_means, tile_of

PROGRAMS = 256  # that a GPU should get at least: two for each of its multiprocessors


@triton.jit
def pointwise_conv_fwd_kernel(x_ptr, bn_ptr, w_ptr, bias_ptr, addend_ptr, beside_ptr, y_ptr, out_ptr, norm, means_ptr,
                              sums_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, M, K, B, N, P, ACT: tl.constexpr,
                              WHOLE: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_B: tl.constexpr,
                              UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                              BLOCK_K: tl.constexpr):  # fmt: skip
    """y = A W^T + bias + addend, A of x and, behind its K channels, of the B of `beside`. out [2, N], mean and variance of y as
    stored, or [5, N] (`store_stats`), of parts [tiles, 2, N]: a tile's mean and sum of squares about it. means [images, N], of
    y over the P rows of each image (`store_means`)."""
    K, B, N = multiple(K, UNIT_K), multiple(B, UNIT_B), multiple(N, UNIT_N)
    tile, block, n = tile_of(tl.program_id(0), N, BLOCK_N)
    first = offset_of(tile, WIDE) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = add_product(total, x_ptr, bn_ptr, w_ptr, m, n, M, K, N, K + B, ACT, BLOCK_K)
    if beside_ptr is not None:
        total = add_product(total, beside_ptr, None, w_ptr + K, m, n, M, B, N, K + B, ACT, BLOCK_K)
    if bias_ptr is not None:
        total += load_row(bias_ptr, 0, n, N).to(tl.float32)[None, :]
    if addend_ptr is not None:
        total += load_rows(addend_ptr, m, n, M, N)
    y = total.to(y_ptr.dtype.element_ty)
    store_rows(y_ptr, m, n, M, N, y)
    if (parts_ptr is not None) or (means_ptr is not None):
        y = tl.where((m < M)[:, None], y.to(tl.float32), 0.0)
        total = tl.sum(y, 0)
    if parts_ptr is not None:
        mean = total / tl.minimum(M - first, BLOCK_M).to(tl.float32)
        d = tl.where((m < M)[:, None], y - mean[None, :], 0.0)
        store_row(parts_ptr + offset_of(tile, WIDE) * 2 * N, 0, n, N, mean)
        store_row(parts_ptr + offset_of(tile, WIDE) * 2 * N, 1, n, N, tl.sum(d * d, 0))
    if means_ptr is not None:
        store_means(y, total, m, first, tile, block, n, M, N, P, means_ptr, sums_ptr, tickets_ptr, WHOLE)
    if parts_ptr is not None:
        done, mean, var = joined_stats(parts_ptr, tickets_ptr, tile, block, n, M, N, BLOCK_M, TASKS, GROUP)
        if done:
            store_stats(out_ptr, mean, var, block, n, N, norm)


def pointwise_conv_fwd(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, stats: bool, means: bool,
                       bias: Tensor | None = None, addend: Tensor | None = None,
                       beside: Tensor | None = None, *norm: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, beside = _triton.image("x", x), _beside(beside, x, bn)
    weight, sizes = _weight(weight, x, beside)
    images, pixels = x.shape[0], x.shape[2] * x.shape[3]
    rows, out = sizes["M"], sizes["N"]
    bn, y = _triton.floats("coefficients", bn, 5, x.shape[1]), empty_image(x, images, out, *x.shape[2:])
    if bias is not None and bias.shape != (out,):
        raise RuntimeError(f"bias has shape {tuple(bias.shape)}; expected ({out},)")
    bias, addend = None if bias is None else bias.contiguous(), None if addend is None else _triton.image("addend", addend, y)
    found = [x.new_empty(n, out, dtype=torch.float32) for n in (Following(*norm).rows(stats), images if means else 0)]
    if not y.numel():
        return y, zero_stats(x, out, stats, norm, rows), found[1].zero_()
    fan = sizes["K"] + sizes["B"]
    more = beside is not None or (means and pixels % 128)
    *most, warps = _largest(HOLDING_MORE if more else FORWARD, x, rows, out)
    block_m, block_n, block_k = _no_more(most, rows, out, fan)
    count, across = triton.cdiv(rows, block_m), triton.cdiv(out, block_n)
    parts = join(x, count, out, across, images if means else 0) if stats or means else NO_JOIN
    sums = x.new_empty(images + count, out, dtype=torch.float32) if means else None
    pointwise_conv_fwd_kernel[(count * across,)](
        *(x, bn, weight, bias, addend, beside, y, found[0], following(norm, out, rows), found[1] if means else None, sums),
        *(parts if stats else parts._replace(parts=None)),
        **sizes,
        **dict(P=pixels, ACT=act, WHOLE=means and pixels % block_m == 0, WIDE=_wide(x, y, beside)),
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
        **dict(num_warps=warps, num_stages=3),
    )
    return y, *found


def pointwise_conv_bwd(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int,
                       weight: Tensor, count: float = 0.0, bias: bool = False, also: Tensor | None = None,
                       beside: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, beside = _triton.image("x", x), _beside(beside, x, bn)
    w, sizes = _weight(weight, x, beside)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    like = x.new_empty(()).expand(x.shape[0], out, *x.shape[2:])
    dy = _triton.image("dy", dy, like)
    if (y is None) != (c is None):
        raise RuntimeError("pointwise_conv: expected both y and c, or neither")
    if also is not None and bn is not None:
        raise RuntimeError("pointwise_conv: du is no gradient of x: expected no other one to add, or no coefficients")
    y, c = (
        None if y is None else _triton.image("y", y, like),
        _triton.floats("c", c, 2 if c is not None and len(c) == 2 else 3, out),
    )
    also = None if also is None else _triton.image("also", also, x)
    bn, du = _triton.floats("coefficients", bn, 5, fan), empty_image(x, *x.shape)
    dbeside = x.new_empty(0) if beside is None else empty_image(beside, *beside.shape)
    table, dweight = x.new_empty(0 if bn is None else GRADIENTS, fan, dtype=torch.float32), weight.new_empty(weight.shape)
    dbias = weight.new_empty(out if bias else 0)
    if not dy.numel() or not weight.numel():
        du = du.zero_() if also is None else du.copy_(also)
        if bias:
            dbias = dy.sum((0, 2, 3))
        return du, dweight.zero_(), table.zero_(), dbias, dbeside.zero_()
    *most, warps = _largest(BACKWARD, x, rows, fan)
    block_m, block_k, block_n = _no_more(most[:3], rows, fan, out)
    weight_n, weight_k, weight_m = _no_more(most[3:], out, fan, rows)
    tiles, across = triton.cdiv(rows, block_m), _across(sizes, block_k)
    dtiles = triton.cdiv(out, weight_n) * _across(sizes, weight_k)
    tasks, chunk = _triton.tasks(rows, 4 * weight_m, PROGRAMS // 2 // dtiles)
    parts = NO_JOIN if bn is None else join(x, tiles, fan, across)
    dparts = join_tiles(x, tasks, w.numel() + len(dbias), dtiles, parts, across)
    pointwise_conv_bwd_kernel[(tasks * dtiles + tiles * across,)](
        *(dy, y, c, x, bn, beside, w, also, du, dbeside, table, dweight, dbias if bias else None, share(count)),
        *(*dparts, *parts, chunk),
        **sizes,
        **dict(C_ROWS=0 if c is None else len(c), ACT=act, WIDE=_wide(x, dy, beside)),
        **dict(BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_N=block_n, WEIGHT_N=weight_n, WEIGHT_K=weight_k, WEIGHT_M=weight_m),
        **dict(num_warps=warps, num_stages=3),
    )
    return du, dweight, table, dbias, dbeside


def _beside(beside: Tensor | None, x: Tensor, bn: Tensor | None) -> Tensor | None:
    """The other input, dense and channels-last"""
    if beside is None:
        return None
    if bn is not None:
        raise RuntimeError("pointwise_conv: expected coefficients, or another input beside x, not both")
    return _triton.image("beside", beside, x.new_empty(()).expand(x.shape[0], beside.shape[1], *x.shape[2:]))


def _weight(weight: Tensor, x: Tensor, beside: Tensor | None) -> tuple[Tensor, dict[str, int]]:
    """([N, K + B], dense; the sizes of a call)"""
    fan, more = x.shape[1], 0 if beside is None else beside.shape[1]
    if weight.dim() != 4 or weight.shape[1:] != (fan + more, 1, 1) or weight.dtype != x.dtype:
        wanted = f"{x.dtype} [C_out, {fan + more}, 1, 1]"
        raise RuntimeError(f"weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected {wanted}")
    sizes = {"M": x.shape[0] * x.shape[2] * x.shape[3], "K": fan, "B": more, "N": len(weight)}
    return weight.flatten(1).contiguous(), sizes | {f"UNIT_{n}": _triton.unit(sizes[n]) for n in "KBN"}


def _across(sizes: dict[str, int], block: int) -> int:
    """Blocks of the columns of x (one at least, of which the bias's gradient is) and of what stands beside it"""
    return max(triton.cdiv(sizes["K"], block), 1) + triton.cdiv(sizes["B"], block)


def _wide(*images: Tensor | None) -> bool:
    return any(t is not None and _triton.wide(t) for t in images)


# By size of a stored value: tiles [rows, columns], the values summed over at a time, and warps; the largest first.
FORWARD = {2: ((128, 128, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)), 4: ((64, 64, 32, 4), (32, 32, 32, 4))}
HOLDING_MORE = {2: FORWARD[2][1:], 4: FORWARD[4]}  # means of images that share tiles, or another input, would spill on sm_80
# Behind the tile of du that of the weight's gradient, [columns of y, columns of x, rows].
BACKWARD = {
    2: ((64, 128, 64, 128, 64, 64, 8), (64, 64, 64, 64, 64, 64, 4)),
    4: ((64, 64, 32, 64, 64, 16, 8), (32, 32, 32, 32, 64, 16, 4)),
}


def _largest(kinds: dict, x: Tensor, rows: int, columns: int) -> tuple[int, ...]:
    """The largest tile of which there are enough to fill a GPU. A function of the sizes alone: it decides the bits of sums."""
    table = kinds[x.element_size()]
    return next((t for t in table if triton.cdiv(rows, t[0]) * triton.cdiv(columns, t[1]) >= PROGRAMS), table[-1])


def _no_more(most: Sequence[int], *sizes: int) -> tuple[int, ...]:
    """The blocks of a tile, of sizes that may be smaller"""
    return tuple(max(_triton.power_of_2(n, m), 16) for n, m in zip(sizes, most, strict=True))
