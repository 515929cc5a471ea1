"""pointwise_conv on a GPU: kernels, then launchers. Images are rows of pixels: x [M, K], y [M, N], with weight [N, K].

Products of tiles, summed in float32. What stands before one (a normalisation with its activation, or the backward of the
normalisation behind y) is applied to the operand in registers and rounded to the storage type, as autocast rounds what a
convolution reads. Sums over rows are taken by tiles, or by tasks of CHUNK rows, and joined in float64 (kernels/_join.py): by
the last tile, those of the weight's gradient and the bias's by programs of the next kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import COLUMNS, NO_JOIN, join, join_columns, joined_stats, joined_sums
from nvae_fast.kernels._norm import Following
from nvae_fast.kernels._tile import (
    MEAN,
    SCALE,
    SHIFT,
    differentiate,
    load_row,
    load_rows,
    multiple,
    offset_of,
    store_row,
    store_rows,
)
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.bn_act.tables import following, share, store_gradients, store_stats, zero_stats
from nvae_fast.kernels.pointwise_conv._device import add_product, gradient_of, store_products, tile_of

PROGRAMS = 256  # that a GPU should get at least: two for each of its multiprocessors


@triton.jit
def pointwise_conv_fwd_kernel(x_ptr, bn_ptr, w_ptr, bias_ptr, addend_ptr, beside_ptr, y_ptr, out_ptr, norm, sums_ptr,
                              parts_ptr, tickets_ptr, TASKS, GROUP, M, K, B, N, P, ACT: tl.constexpr, WIDE: tl.constexpr,
                              UNIT_K: tl.constexpr, UNIT_B: tl.constexpr, UNIT_N: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """y = A W^T + bias + addend, A of x and, behind its K channels, of the B of `beside`. out [2, N], mean and variance of y as
    stored, or [5, N] (`store_stats`), of parts [tiles, 2, N]: a tile's mean and sum of squares about it. sums [images + tiles,
    N]: row image + tile is the sum of y over the rows of that image (of P) in that tile."""
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
    if (parts_ptr is not None) or (sums_ptr is not None):
        y = tl.where((m < M)[:, None], y.to(tl.float32), 0.0)
    if sums_ptr is not None:
        last = (tl.minimum(first + BLOCK_M, M) - 1) // P
        for image in range(first // P, last + 1):
            mine = tl.where((m // P == image)[:, None], y, 0.0)
            store_row(sums_ptr, image + tile, n, N, tl.sum(mine, 0))
    if parts_ptr is not None:
        rows = tl.minimum(M - first, BLOCK_M).to(tl.float32)
        mean = tl.sum(y, 0) / rows
        d = tl.where((m < M)[:, None], y - mean[None, :], 0.0)
        store_row(parts_ptr + offset_of(tile, WIDE) * 2 * N, 0, n, N, mean)
        store_row(parts_ptr + offset_of(tile, WIDE) * 2 * N, 1, n, N, tl.sum(d * d, 0))
        done, mean, var = joined_stats(parts_ptr, tickets_ptr, tile, block, n, M, N, BLOCK_M, TASKS, GROUP)
        if done:
            store_stats(out_ptr, mean, var, block, n, N, norm)


@triton.jit
def pointwise_conv_means_kernel(sums_ptr, means_ptr, M, N, P, TILE, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """means [images, N] of the sums that `pointwise_conv_fwd_kernel` leaves for its tiles of TILE rows"""
    image, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tiles = ((image + 1) * P - 1) // TILE + 1
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for t0 in range(image * P // TILE, tiles, BLOCK_T):
        total += load_rows(sums_ptr + image * N, t0 + tl.arange(0, BLOCK_T), c, tiles, N)
    store_row(means_ptr, image, c, N, tl.sum(total, 0) / P)


@triton.jit
def pointwise_conv_du_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, beside_ptr, w_ptr, also_ptr, du_ptr, dbeside_ptr, out_ptr,
                             dparts_ptr, bparts_ptr, dw_ptr, dbias_ptr, DTASKS, LEAD, share, parts_ptr, tickets_ptr, TASKS,
                             GROUP, M, K, B, N, C_ROWS: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr,
                             UNIT_K: tl.constexpr, UNIT_B: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """du = (G W) act'(u) + also, u = x without bn, and the same of `beside`, whose columns follow; the table of gradients from
    parts [tiles, 2, K]: sum(du), sum(du (x - mean)), of du before it is rounded. The first LEAD programs join what the kernel
    before has left of dw [N, K + B], then of dbias."""
    K, B, N = multiple(K, UNIT_K), multiple(B, UNIT_B), multiple(N, UNIT_N)
    if tl.program_id(0) < LEAD:
        columns = tl.cdiv(N * (K + B), COLUMNS)
        if tl.program_id(0) < columns:
            join_columns(dparts_ptr, dw_ptr, tl.program_id(0), DTASKS, N * (K + B))
        elif dbias_ptr is not None:
            join_columns(bparts_ptr, dbias_ptr, tl.program_id(0) - columns, DTASKS, N)
        return
    program, tiles_of_x = tl.program_id(0) - LEAD, tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    across = tiles_of_x + tl.cdiv(B, BLOCK_K)
    tile, block = program // across, program % across
    m = offset_of(tile, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    if beside_ptr is not None:
        if block >= tiles_of_x:
            b = (block - tiles_of_x) * BLOCK_K + tl.arange(0, BLOCK_K)
            du = gradient_of(dy_ptr, y_ptr, c_ptr, w_ptr + K, m, b, M, B, N, K + B, C_ROWS, BLOCK_N)
            if ACT:
                du = differentiate(du, load_rows(beside_ptr, m, b, M, B), ACT)
            store_rows(dbeside_ptr, m, b, M, B, du)
            return
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    du = gradient_of(dy_ptr, y_ptr, c_ptr, w_ptr, m, k, M, K, N, K + B, C_ROWS, BLOCK_N)
    if bn_ptr is not None:
        x = load_rows(x_ptr, m, k, M, K)
        scale, shift = load_row(bn_ptr, SCALE, k, K), load_row(bn_ptr, SHIFT, k, K)
        du = differentiate(du, x * scale[None, :] + shift[None, :], ACT)
        du = tl.where((m < M)[:, None], du, 0.0)
        parts = parts_ptr + offset_of(tile, WIDE) * 2 * K
        store_row(parts, 0, k, K, tl.sum(du, 0))
        store_row(parts, 1, k, K, tl.sum(du * (x - load_row(bn_ptr, MEAN, k, K)[None, :]), 0))
    elif ACT:
        du = differentiate(du, load_rows(x_ptr, m, k, M, K), ACT)
    if also_ptr is not None:
        du += load_rows(also_ptr, m, k, M, K)
    store_rows(du_ptr, m, k, M, K, du)
    if bn_ptr is not None:
        done, total, moment = joined_sums(parts_ptr, tickets_ptr, tile, block, k, K, TASKS, GROUP)
        if done:
            store_gradients(out_ptr, bn_ptr, total, moment, share, k, K)


@triton.jit
def pointwise_conv_dweight_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, beside_ptr, parts_ptr, bparts_ptr, M, K, B, N, CHUNK,
                                  C_ROWS: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr,
                                  UNIT_B: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                                  BLOCK_K: tl.constexpr):  # fmt: skip
    """parts [tasks, N, K + B]: G^T A over a task's CHUNK rows; bparts [tasks, N]: the sums of G"""
    K, B, N = multiple(K, UNIT_K), multiple(B, UNIT_B), multiple(N, UNIT_N)
    tiles_of_x = tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    across, down = tiles_of_x + tl.cdiv(B, BLOCK_K), tl.cdiv(N, BLOCK_N)
    rest, block = tl.program_id(0) // across, tl.program_id(0) % across
    task, n = rest // down, rest % down * BLOCK_N + tl.arange(0, BLOCK_N)
    first = offset_of(task, WIDE) * CHUNK
    rows = tl.minimum(M - first, CHUNK).to(tl.int32)
    parts_ptr += task.to(tl.int64) * N * (K + B)
    if beside_ptr is not None:
        if block >= tiles_of_x:
            b = (block - tiles_of_x) * BLOCK_K + tl.arange(0, BLOCK_K)
            store_products(dy_ptr, y_ptr, c_ptr, beside_ptr, None, parts_ptr + K, None, first, rows, n, b, M, B, N, K + B,
                           C_ROWS, ACT, BLOCK_M)  # fmt: skip
            return
    if bparts_ptr is not None:
        bparts_ptr += task * N
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    store_products(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, parts_ptr, bparts_ptr, first, rows, n, k, M, K, N, K + B, C_ROWS, ACT,
                   BLOCK_M)  # fmt: skip


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
    block_m, block_n, block_k, options = _tile(HOLDING_MORE if means or beside is not None else FORWARD, x, rows, out, fan)
    count = triton.cdiv(rows, block_m)
    parts = join(x, count, out, triton.cdiv(out, block_n)) if stats else NO_JOIN
    sums = x.new_empty(images + count, out, dtype=torch.float32) if means else None
    pointwise_conv_fwd_kernel[(count * triton.cdiv(out, block_n),)](
        *(x, bn, weight, bias, addend, beside, y, found[0], following(norm, out, rows), sums, *parts),
        **sizes | options,
        **dict(P=pixels, ACT=act, WIDE=_wide(x, y, beside), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
    )
    if sums is not None:
        grid = (images, triton.cdiv(out, 32))
        pointwise_conv_means_kernel[grid](sums, found[1], rows, out, pixels, block_m, BLOCK_T=32, BLOCK_C=32)
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
    common = sizes | {"C_ROWS": 0 if c is None else len(c), "ACT": act, "WIDE": _wide(x, dy, beside)}
    block_n, block_k, block_m, options = _tile(DWEIGHT, x, out, fan, rows)
    tiles = triton.cdiv(out, block_n) * _across(sizes, block_k)
    tasks, chunk = _triton.tasks(rows, 4 * block_m, PROGRAMS // tiles)
    dparts, bparts = x.new_empty(tasks, *w.shape, dtype=torch.float32), None
    if bias:
        bparts = x.new_empty(tasks, out, dtype=torch.float32)
    pointwise_conv_dweight_kernel[(tiles * tasks,)](
        *(dy, y, c, x, bn, beside, dparts, bparts),
        **common | options,
        **dict(CHUNK=chunk, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
    )
    block_m, block_k, block_n, options = _tile(BACKWARD, x, rows, fan, out)
    tiles, across = triton.cdiv(rows, block_m), _across(sizes, block_k)
    parts = NO_JOIN if bn is None else join(x, tiles, fan, across)
    lead = triton.cdiv(w.numel(), COLUMNS.value) + triton.cdiv(len(dbias), COLUMNS.value)
    pointwise_conv_du_kernel[(lead + tiles * across,)](
        *(dy, y, c, x, bn, beside, w, also, du, dbeside, table, dparts, bparts, dweight, dbias if bias else None),
        *(tasks, lead, share(count), *parts),
        **common | options,
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
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
HOLDING_MORE = {2: FORWARD[2][1:], 4: FORWARD[4]}  # means, or another input, would spill at the largest tile on sm_80
BACKWARD = {2: ((64, 128, 64, 8), (64, 64, 64, 4)), 4: ((64, 64, 32, 4), (32, 32, 32, 4))}
DWEIGHT = {2: ((128, 64, 64, 8),), 4: ((64, 64, 16, 8),)}


def _tile(kinds: dict, x: Tensor, rows: int, columns: int, depth: int) -> tuple[int, int, int, dict[str, int]]:
    """The largest tile of which there are enough to fill a GPU. A function of the sizes alone: it decides the bits of sums."""
    table = kinds[x.element_size()]
    enough = (t for t in table if triton.cdiv(rows, t[0]) * triton.cdiv(columns, t[1]) >= PROGRAMS)
    *most, warps = next(enough, table[-1])
    sizes = (max(_triton.power_of_2(n, m), 16) for n, m in zip((rows, columns, depth), most, strict=True))
    return *sizes, {"num_warps": warps, "num_stages": 3}
