"""conv2d's maps and products of tiles on a GPU; what they are for stands in triton.py.

A tile is one patch of an image or several, one after the other: 8 rows of TILE_W pixels, all inside. Row i of a patch is pixel
(i // TILE_W, i % TILE_W). Its area is the patch with DILATION pixels around it, where the nine taps read. What stands before a
product (a normalisation with its activation, or the backward of the one behind y) is applied to the areas of a tile once and
written to a map of the program's own, SPACE rows of DEPTH channels, zeros outside the image and past the last channel: Triton
cannot index shared memory, but what a program has written it may read in any order after a barrier.
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


@triton.jit
def corner(patch, H, W, TILE_W: tl.constexpr):
    """Image, row and column of the first pixel of a patch"""
    across, down = W // TILE_W, H // TILE_H
    return patch // (across * down), patch // across % down * TILE_H, patch % across * TILE_W


@triton.jit
def pixels_of(tile, H, W, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """(rows of the images' memory [BLOCK_M] of a tile, their places in the images)"""
    i = tl.arange(0, BLOCK_M)
    n, top, left = corner(tile * (BLOCK_M // (TILE_H * TILE_W)) + i // (TILE_H * TILE_W), H, W, TILE_W)
    h, w = top + i // TILE_W % TILE_H, left + i % TILE_W
    return (offset_of(n, WIDE) * H + h) * W + w, h, w


@triton.jit
def area_of(tile, p, M, H, W, DILATION: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr):
    """(rows of the images' memory, M outside of the image; whether they are there; whether they are of the tile itself) of the
    pixels p of a tile's areas"""
    WIDTH: tl.constexpr = TILE_W + 2 * DILATION
    AREA: tl.constexpr = (TILE_H + 2 * DILATION) * WIDTH
    PATCHES: tl.constexpr = BLOCK_M // (TILE_H * TILE_W)
    n, top, left = corner(tile * PATCHES + p // AREA, H, W, TILE_W)
    i, j = p % AREA // WIDTH - DILATION, p % WIDTH - DILATION
    h, w = top + i, left + j
    inside = (p < PATCHES * AREA) & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    own = (i >= 0) & (i < TILE_H) & (j >= 0) & (j < TILE_W)
    return tl.where(inside, (offset_of(n, WIDE) * H + h) * W + w, M), inside, inside & own


@triton.jit
def map_activated(map_ptr, x_ptr, bn_ptr, tile, k0, M, K, H, W, ACT: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr,
                  DEPTH: tl.constexpr, SPACE: tl.constexpr, TILE_W: tl.constexpr, BLOCK_M: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """Writes A = act(scale x + shift) of a tile's areas, or act(x) without bn: the channels from k0."""
    for j0 in range(0, DEPTH, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        for p0 in range(0, SPACE, PIXELS):
            p = p0 + tl.arange(0, PIXELS)
            m, inside, _ = area_of(tile, p, M, H, W, DILATION, TILE_W, BLOCK_M, WIDE)
            a = tl.where(inside[:, None], load_activated(x_ptr, bn_ptr, m, k0 + j, M, K, ACT), 0.0)
            tl.store(map_ptr + p[:, None] * DEPTH + j[None, :], a.to(map_ptr.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def map_gradient(map_ptr, g_ptr, keep, dy_ptr, y_ptr, c_ptr, tile, n0, M, N, H, W, C_ROWS: tl.constexpr,
                 DILATION: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, SPACE: tl.constexpr, TILE_W: tl.constexpr,
                 PITCH_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Writes g = c0 dy + c1 y + c2 of a tile's areas: the channels from n0; where `keep` is, that of the tile to g [M, PITCH_G]
    too."""
    for j0 in range(0, DEPTH, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        for p0 in range(0, SPACE, PIXELS):
            p = p0 + tl.arange(0, PIXELS)
            m, inside, own = area_of(tile, p, M, H, W, DILATION, TILE_W, BLOCK_M, WIDE)
            g = tl.where(inside[:, None], load_gradient(dy_ptr, y_ptr, c_ptr, m, n0 + j, M, N, C_ROWS), 0.0)
            g = g.to(map_ptr.dtype.element_ty)
            tl.store(map_ptr + p[:, None] * DEPTH + j[None, :], g)
            kept = (own & keep)[:, None] & (n0 + j < PITCH_G)[None, :]
            tl.store(g_ptr + m[:, None] * PITCH_G + (n0 + j)[None, :], g, mask=kept)
    tl.debug_barrier()


@triton.jit
def add_taps(total, map_ptr, image_ptr, w_ptr, tile, k0, n, H, W, K, N, FLIPPED: tl.constexpr, DILATION: tl.constexpr,
             WIDE: tl.constexpr, DEPTH: tl.constexpr, TILE_W: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """total [BLOCK_M, BLOCK_N] + the nine products of a tile, moved by the taps, with W [N, 9, K], over DEPTH channels from k0;
    FLIPPED: with the transposed convolution's, W [K, 9, N]. The channels are read of the map, or without one of the image
    itself, zeros around."""
    WIDTH: tl.constexpr = TILE_W + 2 * DILATION
    i = tl.arange(0, total.shape[0])
    row = i // (TILE_H * TILE_W) * ((TILE_H + 2 * DILATION) * WIDTH) + i // TILE_W % TILE_H * WIDTH + i % TILE_W
    m, h, w = pixels_of(tile, H, W, TILE_W, total.shape[0], WIDE)
    for step in range(0, 9 * (DEPTH // BLOCK_K)):
        tap, j = step // (DEPTH // BLOCK_K), step % (DEPTH // BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
        k = k0 + j
        if map_ptr is not None:
            moved = row + (tap // 3 * WIDTH + tap % 3) * DILATION
            a = tl.load(map_ptr + moved[:, None] * DEPTH + j[None, :])
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
def join_shares(total, shares_ptr, ticket_ptr, share, SHARES: tl.constexpr):
    """(whether this program is the last of SHARES to call this; then the sum of what they call it with, in their order)"""
    SIZE: tl.constexpr = total.shape[0] * total.shape[1]
    at = tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
    tl.store(shares_ptr + share * SIZE + at, total)
    last = arrive(ticket_ptr, SHARES)
    if last:
        total = tl.zeros_like(total)
        for i in range(0, SHARES):
            total += tl.load(shares_ptr + i * SIZE + at, cache_modifier=".cg")
    return last, total
