"""conv2d's maps and products of tiles on a GPU; what they are for stands in triton.py.

A tile is 8 rows of TILE_W pixels of one image, all inside: row i of it is pixel (i // TILE_W, i % TILE_W). Its area is the tile
with DILATION pixels around it, where the nine taps read. What stands before a product (a normalisation with its activation, or
the backward of the one behind y) is applied to an area once and written to a map of the program's own, SPACE rows of PITCH
values, zeros outside the image and past the last channel: Triton cannot index shared memory, but what a program has written it
may read in any order after a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import arrive
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels.conv2d.ops import TILE
from nvae_fast.kernels.pointwise_conv._device import load_activated, load_gradient

TILE_H = tl.constexpr(TILE)
PIXELS = tl.constexpr(64)  # of an area, written at a time
SLICE, AT_ONCE = tl.constexpr(32), tl.constexpr(4)  # rows of a tile of the weight, and parts of it, that are added at a time


@triton.jit
def corner(tile, H, W, TILE_W: tl.constexpr):
    """Image, row and column of the first pixel of a tile"""
    across, down = W // TILE_W, H // TILE_H
    return tile // (across * down), tile // across % down * TILE_H, tile % across * TILE_W


@triton.jit
def pixels_of(tile, H, W, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """Rows of the images' memory [BLOCK_M] of a tile"""
    TILE_W: tl.constexpr = BLOCK_M // TILE_H
    n, h, w = corner(tile, H, W, TILE_W)
    i = tl.arange(0, BLOCK_M)
    return (offset_of(n, WIDE) * H + h + i // TILE_W) * W + w + i % TILE_W


@triton.jit
def area_of(tile, p, M, H, W, DILATION: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """(rows of the images' memory, M outside of the image; whether they are there; whether they are of the tile itself) of the
    pixels p of a tile's area"""
    TILE_W: tl.constexpr = BLOCK_M // TILE_H
    WIDTH: tl.constexpr = TILE_W + 2 * DILATION
    n, top, left = corner(tile, H, W, TILE_W)
    i, j = p // WIDTH - DILATION, p % WIDTH - DILATION
    h, w = top + i, left + j
    inside = (i < TILE_H + DILATION) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    own = (i >= 0) & (i < TILE_H) & (j >= 0) & (j < TILE_W)
    return tl.where(inside, (offset_of(n, WIDE) * H + h) * W + w, M), inside, own


@triton.jit
def map_activated(map_ptr, x_ptr, bn_ptr, tile, M, K, H, W, ACT: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr,
                  PITCH: tl.constexpr, SPACE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes A = act(scale x + shift) of a tile's area, or act(x) without bn."""
    for k0 in range(0, PITCH, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        for p0 in range(0, SPACE, PIXELS):
            p = p0 + tl.arange(0, PIXELS)
            m, inside, _ = area_of(tile, p, M, H, W, DILATION, BLOCK_M, WIDE)
            a = tl.where(inside[:, None], load_activated(x_ptr, bn_ptr, m, k, M, K, ACT), 0.0)
            tl.store(map_ptr + p[:, None] * PITCH + k[None, :], a.to(map_ptr.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def map_gradient(map_ptr, g_ptr, keep, dy_ptr, y_ptr, c_ptr, tile, M, N, H, W, C_ROWS: tl.constexpr, DILATION: tl.constexpr,
                 WIDE: tl.constexpr, PITCH: tl.constexpr, SPACE: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Writes g = c0 dy + c1 y + c2 of a tile's area; where `keep` is, that of the tile to g [M, PITCH] too."""
    for n0 in range(0, PITCH, BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        for p0 in range(0, SPACE, PIXELS):
            p = p0 + tl.arange(0, PIXELS)
            m, inside, own = area_of(tile, p, M, H, W, DILATION, BLOCK_M, WIDE)
            g = tl.where(inside[:, None], load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS), 0.0)
            g = g.to(map_ptr.dtype.element_ty)
            tl.store(map_ptr + p[:, None] * PITCH + n[None, :], g)
            tl.store(g_ptr + m[:, None] * PITCH + n[None, :], g, mask=(own & keep)[:, None])
    tl.debug_barrier()


@triton.jit
def add_taps(total, map_ptr, image_ptr, w_ptr, tile, n, H, W, K, N, FLIPPED: tl.constexpr, DILATION: tl.constexpr,
             WIDE: tl.constexpr, PITCH: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """total [BLOCK_M, BLOCK_N] + the nine products of a tile, moved by the taps, with W [N, 9, K]; FLIPPED: with the transposed
    convolution's, W [K, 9, N]. K channels are read of the map, or without one of the image itself, zeros around."""
    BLOCK_M: tl.constexpr = total.shape[0]
    TILE_W: tl.constexpr = BLOCK_M // TILE_H
    i = tl.arange(0, BLOCK_M)
    row = i // TILE_W * (TILE_W + 2 * DILATION) + i % TILE_W
    _, top, left = corner(tile, H, W, TILE_W)
    h, w, m = top + i // TILE_W, left + i % TILE_W, pixels_of(tile, H, W, BLOCK_M, WIDE)
    blocks = tl.cdiv(K, BLOCK_K)
    for step in range(0, 9 * blocks):
        tap, k = step // blocks, step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        if map_ptr is not None:
            moved = row + (tap // 3 * (TILE_W + 2 * DILATION) + tap % 3) * DILATION
            a = tl.load(map_ptr + moved[:, None] * PITCH + k[None, :])
        else:
            dh, dw = (tap // 3 - 1) * DILATION, (tap % 3 - 1) * DILATION
            seen = (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
            moved = m + (dh * W + dw)
            a = tl.load(image_ptr + moved[:, None] * K + k[None, :], mask=seen[:, None] & (k < K)[None, :], other=0.0)
        if FLIPPED:
            at = k[:, None] * (9 * N) + ((8 - tap) * N + n)[None, :]
        else:
            at = (tap * K + k)[:, None] + n[None, :] * (9 * K)
        weight = tl.load(w_ptr + at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, weight, total, input_precision="ieee")
    return total


@triton.jit
def add_tiles(parts_ptr, first, last, to_ptr, n0, tap, k, N, K, to_n, to_k, BLOCK_N: tl.constexpr):
    """to [., .], of strides to_n and to_k: the sum of parts first to last - 1, [., N, 9, K], in float64; of BLOCK_N rows from
    n0 and the columns k of a tap"""
    ROWS: tl.constexpr = min(SLICE, BLOCK_N)
    for j in range(0, BLOCK_N, ROWS):
        n = n0 + j + tl.arange(0, ROWS)
        inside = (n < N)[:, None] & (k < K)[None, :]
        at = ((n * 9 + tap) * K)[:, None] + k[None, :]
        total = tl.zeros([ROWS, k.shape[0]], tl.float64)
        for t0 in range(first, last, AT_ONCE):
            t = t0 + tl.arange(0, AT_ONCE)
            start = (t.to(tl.int64) * (9 * N * K))[:, None, None]
            mask = (t < last)[:, None, None] & inside[None, :, :]
            part = tl.load(parts_ptr + (start + at[None, :, :]), mask=mask, other=0.0, cache_modifier=".cg")
            total += tl.sum(part.to(tl.float64), 0)
        tl.store(to_ptr + n[:, None] * to_n + k[None, :] * to_k, total.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def join_tiles(parts_ptr, tickets_ptr, task, TASKS, GROUP, to_ptr, n0, tap, k, N, K, to_n, to_k, BLOCK_N: tl.constexpr):
    """The same sum over all TASKS of parts [TASKS + groups, N, 9, K], by the last program to call this; each must have stored
    its part before. tickets [1 + groups] are those of these rows, columns and tap."""
    group, first = task // GROUP, task // GROUP * GROUP
    last = tl.minimum(first + GROUP, TASKS)
    if arrive(tickets_ptr + 1 + group, last - first):
        if GROUP < TASKS:
            above = parts_ptr + (TASKS + group).to(tl.int64) * (9 * N * K)
            add_tiles(parts_ptr, first, last, above + tap * K, n0, tap, k, N, K, 9 * K, 1, BLOCK_N)
            groups = tl.cdiv(TASKS, GROUP)
            if arrive(tickets_ptr, groups):
                add_tiles(parts_ptr, TASKS, TASKS + groups, to_ptr, n0, tap, k, N, K, to_n, to_k, BLOCK_N)
        else:
            add_tiles(parts_ptr, first, last, to_ptr, n0, tap, k, N, K, to_n, to_k, BLOCK_N)
