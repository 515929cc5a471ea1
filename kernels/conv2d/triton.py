"""conv2d on a GPU: kernels, then launchers, of a dense 3x3 convolution of stride 1 with DILATION zeros around.

Images are rows of pixels, x [M, K], y [M, N], M = B H W; the weight is [N, 9, K]. Products of tiles (_device.py), summed in
float32. Sums over pixels are taken by tiles, or by tasks of CHUNK rows, and joined in float64 by the last (kernels/_join.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import NO_JOIN, join, joined_stats, joined_sums
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
from nvae_fast.kernels.conv2d._device import PIXELS, add_taps, join_tiles, map_activated, map_gradient, pixels_of
from nvae_fast.kernels.conv2d.ops import TILE, fits
from nvae_fast.kernels.pointwise_conv._device import load_activated

PROGRAMS = 128  # that a GPU should get: about one for each of its multiprocessors
JOINED = 4  # tasks that are joined at once


@triton.jit
def conv2d_fwd_kernel(x_ptr, bn_ptr, w_ptr, y_ptr, out_ptr, norm, map_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, M, K, N, H, W,
                      ACT: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
                      PITCH: tl.constexpr, SPACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_K: tl.constexpr):  # fmt: skip
    """y = conv(A, W). out [2, N], mean and variance of y as stored, or [5, N] (`store_stats`), of parts [tiles, 2, N]: a tile's
    mean and sum of squares about it."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    program, across = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    tile, block = program // across, program % across
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if map_ptr is not None:
        map_ptr += program.to(tl.int64) * SPACE * PITCH
        map_activated(map_ptr, x_ptr, bn_ptr, tile, M, K, H, W, ACT, DILATION, WIDE, PITCH, SPACE, BLOCK_M, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = add_taps(total, map_ptr, x_ptr, w_ptr, tile, n, H, W, K, N, False, DILATION, WIDE, PITCH, BLOCK_K)
    y = total.to(y_ptr.dtype.element_ty)
    store_rows(y_ptr, pixels_of(tile, H, W, BLOCK_M, WIDE), n, M, N, y)
    if parts_ptr is not None:
        y = y.to(tl.float32)
        mean = tl.sum(y, 0) / BLOCK_M
        d = y - mean[None, :]
        parts = parts_ptr + offset_of(tile, WIDE) * 2 * N
        store_row(parts, 0, n, N, mean)
        store_row(parts, 1, n, N, tl.sum(d * d, 0))
        done, mean, var = joined_stats(parts_ptr, tickets_ptr, tile, block, n, M, N, BLOCK_M, TASKS, GROUP)
        if done:
            store_stats(out_ptr, mean, var, block, n, N, norm)


@triton.jit
def store_du(du, x_ptr, bn_ptr, du_ptr, parts_ptr, tile, m, k, M, K, ACT: tl.constexpr, WIDE: tl.constexpr):
    """Of the columns k of a tile: du act'(u), and its sums."""
    if bn_ptr is not None:
        x, scale, shift = load_rows(x_ptr, m, k, M, K), load_row(bn_ptr, SCALE, k, K), load_row(bn_ptr, SHIFT, k, K)
        du = differentiate(du, x * scale[None, :] + shift[None, :], ACT)
        parts = parts_ptr + offset_of(tile, WIDE) * 2 * K
        store_row(parts, 0, k, K, tl.sum(du, 0))
        store_row(parts, 1, k, K, tl.sum(du * (x - load_row(bn_ptr, MEAN, k, K)[None, :]), 0))
    elif ACT:
        du = differentiate(du, load_rows(x_ptr, m, k, M, K), ACT)
    store_rows(du_ptr, m, k, M, K, du)


@triton.jit
def conv2d_du_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, w_ptr, du_ptr, g_ptr, a_ptr, out_ptr, share, map_ptr, parts_ptr,
                     tickets_ptr, TASKS, GROUP, M, K, N, H, W, C_ROWS: tl.constexpr, ACT: tl.constexpr, DILATION: tl.constexpr,
                     WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr, PITCH: tl.constexpr, SPACE: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PITCH_A: tl.constexpr):  # fmt: skip
    """du = (transposed conv of g) act'(u), u = x without bn; the table of gradients from parts [tiles, 2, K]: sum(du),
    sum(du (x - mean)), of du before it is rounded. Leaves g [M, PITCH], unless it is dy, and A [M, PITCH_A], unless it is x."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    program, across = tl.program_id(0), tl.cdiv(K, BLOCK_K)
    tile, block = program // across, program % across
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    if map_ptr is not None:
        map_ptr += program.to(tl.int64) * SPACE * PITCH
        map_gradient(map_ptr, g_ptr, block == 0, dy_ptr, y_ptr, c_ptr, tile, M, N, H, W, C_ROWS, DILATION, WIDE, PITCH, SPACE,
                     BLOCK_M, BLOCK_N)  # fmt: skip
    m = pixels_of(tile, H, W, BLOCK_M, WIDE)
    if a_ptr is not None:  # before the products, whose sums take the registers
        a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
        tl.store(a_ptr + m[:, None] * PITCH_A + k[None, :], a, mask=(k < PITCH_A)[None, :])
        tl.debug_barrier()
    du = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    du = add_taps(du, map_ptr, dy_ptr, w_ptr, tile, k, H, W, N, K, True, DILATION, WIDE, PITCH, BLOCK_N)
    if BLOCK_M * BLOCK_K > 64 * 128:  # one half after the other: both would spill
        HALF: tl.constexpr = BLOCK_K // 2
        left, right = tl.split(tl.permute(tl.reshape(du, [BLOCK_M, 2, HALF]), [0, 2, 1]))
        first = block * BLOCK_K + tl.arange(0, HALF)
        store_du(left, x_ptr, bn_ptr, du_ptr, parts_ptr, tile, m, first, M, K, ACT, WIDE)
        tl.debug_barrier()
        store_du(right, x_ptr, bn_ptr, du_ptr, parts_ptr, tile, m, first + HALF, M, K, ACT, WIDE)
    else:
        store_du(du, x_ptr, bn_ptr, du_ptr, parts_ptr, tile, m, k, M, K, ACT, WIDE)
    if bn_ptr is not None:
        done, total, moment = joined_sums(parts_ptr, tickets_ptr, tile, block, k, K, TASKS, GROUP)
        if done:
            store_gradients(out_ptr, bn_ptr, total, moment, share, k, K)


@triton.jit
def conv2d_dweight_kernel(g_ptr, a_ptr, dw_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, CHUNK, M, K, N, dw_n, dw_k, dw_h, dw_w,
                          H: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr,
                          UNIT_N: tl.constexpr, PITCH_G: tl.constexpr, PITCH_A: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """dw = G^T A of every tap, A moved by it and 0 outside the image, from parts [tasks, N, 9, K] of CHUNK rows each, or
    at once where there is one task alone. Rows of G [M, PITCH_G] and A [M, PITCH_A] end with zeros."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    across, down = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    task, tile = tl.program_id(0) // (9 * down * across), tl.program_id(0) % (9 * down * across)
    tap, n0 = tile // (down * across), tile // across % down * BLOCK_N
    n, k = n0 + tl.arange(0, BLOCK_N), tile % across * BLOCK_K + tl.arange(0, BLOCK_K)
    dh, dw = (tap // 3 - 1) * DILATION, (tap % 3 - 1) * DILATION
    first = offset_of(task, WIDE) * CHUNK
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for m0 in range(0, tl.minimum(M - first, CHUNK).to(tl.int32), BLOCK_M):
        m = first + m0 + tl.arange(0, BLOCK_M)
        h, w = m // W % H + dh, m % W + dw
        seen = (h >= 0) & (h < H) & (w >= 0) & (w < W)
        g = tl.load(g_ptr + m[:, None] * PITCH_G + n[None, :], mask=(n < PITCH_G)[None, :], other=0.0)
        at = (m + (dh * W + dw))[:, None] * PITCH_A + k[None, :]
        a = tl.load(a_ptr + at, mask=seen[:, None] & (k < PITCH_A)[None, :], other=0.0)
        total = tl.dot(tl.trans(g), a, total, input_precision="ieee")
    inside = (n < N)[:, None] & (k < K)[None, :]
    dw_ptr += tap // 3 * dw_h + tap % 3 * dw_w
    if parts_ptr is None:
        tl.store(dw_ptr + n[:, None] * dw_n + k[None, :] * dw_k, total.to(dw_ptr.dtype.element_ty), mask=inside)
    else:
        at = ((n * 9 + tap) * K)[:, None] + k[None, :]
        tl.store(parts_ptr + task.to(tl.int64) * (9 * N * K) + at, total, mask=inside)
        tickets = tickets_ptr + tile * (1 + tl.cdiv(TASKS, GROUP))
        join_tiles(parts_ptr, tickets, task, TASKS, GROUP, dw_ptr, n0, tap, k, N, K, dw_n, dw_k, BLOCK_N)


def conv2d_fwd(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, dilation: int, stats: bool,
               *norm: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, w, sizes = _arguments(x, weight, dilation)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    bn, y = _triton.floats("coefficients", bn, 5, fan), empty_image(x, x.shape[0], out, *x.shape[2:])
    found = x.new_empty(Following(*norm).rows(stats), out, dtype=torch.float32)
    if not y.numel():
        return y, zero_stats(x, out, stats, norm, rows)
    plan = _plan(x, out, fan, dilation, mapped=bn is not None or act > 0)
    parts = join(x, rows // plan.block_m, out, triton.cdiv(out, plan.block_n)) if stats else NO_JOIN
    conv2d_fwd_kernel[(plan.programs,)](
        *(x, bn, w, y, found, following(norm, out, rows), plan.map, *parts),
        **sizes | plan.options,
        **dict(ACT=act, DILATION=dilation, WIDE=_wide(x, y), BLOCK_N=plan.block_n, BLOCK_K=plan.block_k),
    )
    return y, found


def conv2d_bwd(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int, weight: Tensor,
               dilation: int, count: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, w, sizes = _arguments(x, weight, dilation)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    like = x.new_empty(()).expand(x.shape[0], out, *x.shape[2:])
    dy = _triton.image("dy", dy, like)
    if (y is None) != (c is None):
        raise RuntimeError("conv2d: expected both y and c, or neither")
    if c is not None:
        y, c = _triton.image("y", y, like), _triton.floats("c", c, 2 if len(c) == 2 else 3, out)
    bn, du, dweight = _triton.floats("coefficients", bn, 5, fan), empty_image(x, *x.shape), torch.empty_like(weight)
    table = x.new_empty(0 if bn is None else GRADIENTS, fan, dtype=torch.float32)
    if not dy.numel() or not weight.numel():
        return du.zero_(), dweight.zero_(), table.zero_()
    plan = _plan(x, fan, out, dilation, mapped=c is not None)
    g = dy if c is None else x.new_empty(rows, plan.options["PITCH"])
    changed, pitch_a = bn is not None or act > 0, fan
    if changed:
        pitch_a = triton.cdiv(fan, 16) * 16
    a = x.new_empty(rows, pitch_a) if changed else x
    wide = any(map(_triton.wide, (x, dy, a, g)))
    parts = NO_JOIN if bn is None else join(x, rows // plan.block_m, fan, triton.cdiv(fan, plan.block_n))
    conv2d_du_kernel[(plan.programs,)](
        *(dy, y, c, x, bn, w, du, None if c is None else g, a if changed else None, table, share(count), plan.map, *parts),
        **sizes | plan.options,
        **dict(C_ROWS=0 if c is None else len(c), ACT=act, DILATION=dilation, WIDE=wide),
        **dict(BLOCK_N=plan.block_k, BLOCK_K=plan.block_n, PITCH_A=pitch_a),
    )
    _dweight(g, a, dweight, sizes, dilation, wide)
    return du, dweight, table


def _dweight(g: Tensor, a: Tensor, dweight: Tensor, sizes: dict[str, int], dilation: int, wide: bool) -> None:
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    count = lambda t: 9 * triton.cdiv(out, t[0]) * triton.cdiv(fan, t[1])  # noqa: E731
    table = DWEIGHT[a.element_size()]
    tile = next((t for t in table if count(t) * JOINED >= PROGRAMS), table[-1])
    *most, block_m, warps, stages = tile
    block_n, block_k = (max(_triton.power_of_2(n, m), 16) for n, m in zip((out, fan), most, strict=True))
    tiles = count(tile)
    tasks, chunk = _triton.tasks(rows, 4 * block_m, PROGRAMS // tiles)
    group = tasks if tasks <= JOINED else math.isqrt(tasks - 1) + 1
    parts = tickets = None
    if tasks > 1:
        groups = triton.cdiv(tasks, group)
        parts = a.new_empty(tasks + groups, out, 9, fan, dtype=torch.float32)
        tickets = _triton.tickets(a.device, tiles * (1 + groups))
    conv2d_dweight_kernel[(tiles * tasks,)](
        *(g, a, dweight, parts, tickets, tasks, group, chunk, rows, fan, out, *dweight.stride(), sizes["H"], sizes["W"]),
        **dict(DILATION=dilation, WIDE=wide, UNIT_K=sizes["UNIT_K"], UNIT_N=sizes["UNIT_N"]),
        **dict(PITCH_G=g.shape[1], PITCH_A=a.shape[1], BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k),
        **dict(num_warps=warps, num_stages=stages),
    )


def _arguments(x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, dict[str, int]]:
    """(x, dense and channels-last; the weight [N, 9, K], dense; the sizes of a call)"""
    x, (batch, fan, height, width) = _triton.image("x", x), x.shape
    if weight.dim() != 4 or weight.shape[1:] != (fan, 3, 3) or weight.dtype != x.dtype:
        wanted = f"{x.dtype} [C_out, {fan}, 3, 3]"
        raise RuntimeError(f"weight has shape {tuple(weight.shape)} and type {weight.dtype}; expected {wanted}")
    reason = fits(x, weight, 1, dilation, dilation)
    if reason is not None:
        raise RuntimeError(f"conv2d: {reason}")
    sizes = {"M": batch * height * width, "K": fan, "N": len(weight), "H": height, "W": width}
    units = {f"UNIT_{n}": _triton.unit(sizes[n]) for n in "KN"}
    return x, weight.permute(0, 2, 3, 1).contiguous(), sizes | units


def _wide(*images: Tensor | None) -> bool:
    return any(t is not None and _triton.wide(t) for t in images)


class Plan(NamedTuple):
    """Tiles of a product over the nine taps, and the maps of its programs."""

    block_m: int
    block_n: int
    block_k: int
    programs: int
    map: Tensor | None
    options: dict[str, int]


# By size of a stored value: tiles [pixels, columns], the channels summed over at a time, warps and stages; the largest first.
TILES = {
    2: ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4), (64, 32, 64, 4, 4)),
    4: ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
}
# The same of tiles of the weight [columns of y, of x] and the rows summed over at a time.
DWEIGHT = {2: ((128, 128, 64, 8, 3), (64, 64, 64, 4, 5)), 4: ((64, 64, 16, 8, 3),)}


def _plan(x: Tensor, columns: int, depth: int, dilation: int, mapped: bool) -> Plan:
    """The largest tile of which there are enough to fill a GPU. A function of the sizes alone: it decides the bits of sums."""
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    whole = [t for t in TILES[x.element_size()] if x.shape[3] % (t[0] // TILE) == 0]
    enough = (t for t in whole if rows // t[0] * triton.cdiv(columns, t[1]) >= PROGRAMS)
    block_m, *most, warps, stages = next(enough, whole[-1])
    block_n, block_k = (max(_triton.power_of_2(n, m), 16) for n, m in zip((columns, depth), most, strict=True))
    across, tiles = triton.cdiv(columns, block_n), rows // block_m
    pitch = triton.cdiv(depth, block_k) * block_k
    area = (TILE + 2 * dilation) * (block_m // TILE + 2 * dilation)
    space = triton.cdiv(area, PIXELS.value) * PIXELS.value
    scratch = x.new_empty(tiles * across, space, pitch) if mapped else None
    options = dict(PITCH=pitch, SPACE=space, BLOCK_M=block_m, num_warps=warps, num_stages=stages)
    return Plan(block_m, block_n, block_k, tiles * across, scratch, options)
