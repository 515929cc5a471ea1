"""pointwise_conv on a GPU: kernels, then launchers. Images are rows of pixels: x [M, K], y [M, N], with weight [N, K].

Products of tiles, summed in float32. What stands before one (a normalisation with its activation, or the backward of the
normalisation behind y) is applied to the operand in registers and rounded to the storage type, as autocast rounds what a
convolution reads. Sums over rows are taken by tiles, or by tasks of CHUNK rows, and joined in float64 (kernels/_join.py): by
the last tile, those of the weight's gradient by programs of the next kernel.
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
    activate,
    differentiate,
    load_pitched,
    load_row,
    load_rows,
    multiple,
    offset_of,
    store_row,
    store_rows,
)
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.bn_act.tables import following, share, store_gradients, store_stats, zero_stats

PROGRAMS = 256  # that a GPU should get at least: two for each of its multiprocessors


@triton.jit
def tile_of(program, WIDTH, BLOCK: tl.constexpr):
    """(tile of rows, block of columns, columns) of a program: those of one tile of rows run side by side and meet in the
    second-level cache."""
    across = tl.cdiv(WIDTH, BLOCK)
    return program // across, program % across, program % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_activated(x_ptr, bn_ptr, m, k, M, K, ACT: tl.constexpr):
    """A = act(scale x + shift) [BLOCK_M, BLOCK_K] as stored, or x without bn; columns outside are 0."""
    a = load_pitched(x_ptr, m, k, M, K, K)
    if bn_ptr is not None:
        scale, shift = load_row(bn_ptr, SCALE, k, K), load_row(bn_ptr, SHIFT, k, K)
        a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT).to(x_ptr.dtype.element_ty)
    return a


@triton.jit
def load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS: tl.constexpr):
    """g = c0 dy + c1 y + c2 [BLOCK_M, BLOCK_N] as stored, or dy without c; columns outside are 0. In a c of 2 rows c0 is 1."""
    g = load_pitched(dy_ptr, m, n, M, N, N)
    if c_ptr is not None:
        c1, c2 = load_row(c_ptr, C_ROWS - 2, n, N), load_row(c_ptr, C_ROWS - 1, n, N)
        rest = load_pitched(y_ptr, m, n, M, N, N).to(tl.float32) * c1[None, :]
        wide = g.to(tl.float32)
        if C_ROWS == 3:
            wide *= load_row(c_ptr, 0, n, N)[None, :]
        g = (wide + rest + c2[None, :]).to(dy_ptr.dtype.element_ty)
    return g


@triton.jit
def pointwise_conv_fwd_kernel(x_ptr, bn_ptr, w_ptr, y_ptr, out_ptr, norm, sums_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, M,
                              K, N, P, ACT: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """y = A W^T. out [2, N], mean and variance of y as stored, or [5, N] (`store_stats`), of parts [tiles, 2, N]: a tile's mean
    and sum of squares about it. sums [images + tiles, N]: row image + tile is the sum of y over the rows of that image (of P)
    in that tile."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    tile, block, n = tile_of(tl.program_id(0), N, BLOCK_N)
    first = offset_of(tile, WIDE) * BLOCK_M
    m = first + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
        w = tl.load(w_ptr + n[None, :] * K + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
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
def pointwise_conv_du_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, w_ptr, du_ptr, out_ptr, dparts_ptr, dw_ptr, DTASKS, LEAD,
                             share, parts_ptr, tickets_ptr, TASKS, GROUP, M, K, N, C_ROWS: tl.constexpr, ACT: tl.constexpr,
                             WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr,
                             BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """du = (G W) act'(u), or G W without bn; the table of gradients from parts [tiles, 2, K]: sum(du), sum(du (x - mean)), of
    du before it is rounded. The first LEAD programs join what the kernel before has left of dw [N, K]."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    if tl.program_id(0) < LEAD:
        join_columns(dparts_ptr, dw_ptr, tl.program_id(0), DTASKS, N * K)
        return
    tile, block, k = tile_of(tl.program_id(0) - LEAD, K, BLOCK_K)
    m = offset_of(tile, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    du = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        g = load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS)
        du = tl.dot(g, load_pitched(w_ptr, n, k, N, K, K), du, input_precision="ieee")
    if bn_ptr is not None:
        x = load_rows(x_ptr, m, k, M, K)
        scale, shift = load_row(bn_ptr, SCALE, k, K), load_row(bn_ptr, SHIFT, k, K)
        du = differentiate(du, x * scale[None, :] + shift[None, :], ACT)
        du = tl.where((m < M)[:, None], du, 0.0)
        parts = parts_ptr + offset_of(tile, WIDE) * 2 * K
        store_row(parts, 0, k, K, tl.sum(du, 0))
        store_row(parts, 1, k, K, tl.sum(du * (x - load_row(bn_ptr, MEAN, k, K)[None, :]), 0))
    store_rows(du_ptr, m, k, M, K, du)
    if bn_ptr is not None:
        done, total, moment = joined_sums(parts_ptr, tickets_ptr, tile, block, k, K, TASKS, GROUP)
        if done:
            store_gradients(out_ptr, bn_ptr, total, moment, share, k, K)


@triton.jit
def pointwise_conv_dweight_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, parts_ptr, M, K, N, CHUNK, C_ROWS: tl.constexpr,
                                  ACT: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
                                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """parts [tasks, N, K]: G^T A over a task's CHUNK rows"""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    rest, _, k = tile_of(tl.program_id(0), K, BLOCK_K)
    task, n = rest // tl.cdiv(N, BLOCK_N), rest % tl.cdiv(N, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = offset_of(task, WIDE) * CHUNK
    m = first + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for _ in range(0, tl.minimum(M - first, CHUNK).to(tl.int32), BLOCK_M):
        g = load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS)
        if c_ptr is not None:
            g = tl.where((m < M)[:, None], g, 0.0)  # c2 stands in rows past the end
        a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
        total = tl.dot(tl.trans(g), a, total, input_precision="ieee")
        m += BLOCK_M
    store_rows(parts_ptr + task.to(tl.int64) * N * K, n, k, N, K, total)


def pointwise_conv_fwd(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, stats: bool, means: bool,
                       *norm: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, weight = _triton.image("x", x), _weight(weight, x)
    images, pixels, sizes = x.shape[0], x.shape[2] * x.shape[3], _sizes(x, weight)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    bn, y = _triton.floats("coefficients", bn, 5, fan), empty_image(x, images, out, *x.shape[2:])
    found = [x.new_empty(n, out, dtype=torch.float32) for n in (Following(*norm).rows(stats), images if means else 0)]
    if not y.numel() or not fan:
        return y.zero_(), zero_stats(x, out, stats, norm, rows), found[1].zero_()
    block_m, block_n, block_k, options = _tile(WITH_MEANS if means else FORWARD, x, rows, out, fan)
    count = triton.cdiv(rows, block_m)
    parts = join(x, count, out, triton.cdiv(out, block_n)) if stats else NO_JOIN
    sums = x.new_empty(images + count, out, dtype=torch.float32) if means else None
    pointwise_conv_fwd_kernel[(count * triton.cdiv(out, block_n),)](
        *(x, bn, weight, y, found[0], following(norm, out, rows), sums, *parts),
        **sizes | options,
        **dict(P=pixels, ACT=act, WIDE=_wide(x, y), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
    )
    if sums is not None:
        grid = (images, triton.cdiv(out, 32))
        pointwise_conv_means_kernel[grid](sums, found[1], rows, out, pixels, block_m, BLOCK_T=32, BLOCK_C=32)
    return y, *found


def pointwise_conv_bwd(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int,
                       weight: Tensor, count: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, w = _triton.image("x", x), _weight(weight, x)
    sizes = _sizes(x, w)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    like = x.new_empty(()).expand(x.shape[0], out, *x.shape[2:])
    dy = _triton.image("dy", dy, like)
    if (y is None) != (c is None):
        raise RuntimeError("pointwise_conv: expected both y and c, or neither")
    y, c = (
        None if y is None else _triton.image("y", y, like),
        _triton.floats("c", c, 2 if c is not None and len(c) == 2 else 3, out),
    )
    bn, du = _triton.floats("coefficients", bn, 5, fan), empty_image(x, *x.shape)
    table, dweight = x.new_empty(0 if bn is None else GRADIENTS, fan, dtype=torch.float32), weight.new_empty(weight.shape)
    if not x.numel() or not dy.numel():
        return du.zero_(), dweight.zero_(), table.zero_()
    common = sizes | {"C_ROWS": 0 if c is None else len(c), "ACT": act, "WIDE": _wide(x, dy)}
    block_n, block_k, block_m, options = _tile(DWEIGHT, x, out, fan, rows)
    tiles = triton.cdiv(out, block_n) * triton.cdiv(fan, block_k)
    tasks, chunk = _triton.tasks(rows, 4 * block_m, PROGRAMS // tiles)
    dparts = table.new_empty(tasks, out, fan)
    pointwise_conv_dweight_kernel[(tiles * tasks,)](
        *(dy, y, c, x, bn, dparts), **common | options, CHUNK=chunk, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k
    )
    block_m, block_k, block_n, options = _tile(BACKWARD, x, rows, fan, out)
    tiles, across = triton.cdiv(rows, block_m), triton.cdiv(fan, block_k)
    parts = NO_JOIN if bn is None else join(x, tiles, fan, across)
    lead = triton.cdiv(out * fan, COLUMNS.value)
    pointwise_conv_du_kernel[(lead + tiles * across,)](
        *(dy, y, c, x, bn, w, du, table, dparts, dweight, tasks, lead, share(count), *parts),
        **common | options,
        **dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
    )
    return du, dweight, table


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """[N, K], dense"""
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1) or weight.dtype != x.dtype:
        wanted = f"{x.dtype} [C_out, {x.shape[1]}, 1, 1]"
        raise RuntimeError(f"weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected {wanted}")
    return weight.flatten(1).contiguous()


def _sizes(x: Tensor, weight: Tensor) -> dict[str, int]:
    out, fan = weight.shape
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return {"M": rows, "K": fan, "N": out, "UNIT_K": _triton.unit(fan), "UNIT_N": _triton.unit(out)}


def _wide(*images: Tensor) -> bool:
    return any(_triton.wide(t) for t in images)


# By size of a stored value: tiles [rows, columns], the values summed over at a time, and warps; the largest first.
FORWARD = {2: ((128, 128, 64, 8), (64, 128, 64, 8), (64, 64, 64, 4)), 4: ((64, 64, 32, 4), (32, 32, 32, 4))}
WITH_MEANS = {2: FORWARD[2][1:], 4: FORWARD[4]}  # whose sums of samples would spill at the largest tile on sm_80
BACKWARD = {2: ((64, 128, 64, 8), (64, 64, 64, 4)), 4: ((64, 64, 32, 4), (32, 32, 32, 4))}
DWEIGHT = {2: ((128, 64, 64, 8),), 4: ((64, 64, 16, 8),)}


def _tile(kinds: dict, x: Tensor, rows: int, columns: int, depth: int) -> tuple[int, int, int, dict[str, int]]:
    """The largest tile of which there are enough to fill a GPU. A function of the sizes alone: it decides the bits of sums."""
    table = kinds[x.element_size()]
    enough = (t for t in table if triton.cdiv(rows, t[0]) * triton.cdiv(columns, t[1]) >= PROGRAMS)
    *most, warps = next(enough, table[-1])
    sizes = (max(_triton.power_of_2(n, m), 16) for n, m in zip((rows, columns, depth), most, strict=True))
    return *sizes, {"num_warps": warps, "num_stages": 3}
