"""flow_cell on a GPU: what its kernels share, and the forward one. README.md has the plan, triton.py the launchers.

A program takes tiles of [TILE_N, TILE_H, TILE_W] pixels, one after the other. Hidden maps of a tile and of what its taps reach
(its area, cut at the borders of the image) lie in a scratch of the program's own, [SPACE, PITCH] of float32 or bfloat16: Triton
cannot index shared memory, but what a program has written it may read in any order after a barrier, mostly from L1. Work goes
through an area in pieces of PIXELS pixels. An area is (top, left, images, height, width).

Weights are w_in [E, 9, Z], w_dw [E, 25] and w_out [Z, E]; of these w_dw, read for every piece, is copied to the scratch, as
float32 [32 taps, PITCH]. Which taps are live, not 0 for all channels, is found by each program: bits, tap 0 the lowest. Dots
take float32 at PRECISION, a name of Triton's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._tile import load_row, multiple, offset_of


@triton.jit
def elu(u):
    """expm1 by its series where exp(u) - 1 would lose digits."""
    series = u * (1 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u * (1 / 5040 + u / 40320)))))))
    return tl.where(u > 0, u, tl.where(u > -0.5, series, tl.exp(u) - 1.0))


@triton.jit
def slope(u, value):
    """elu'(u), value = elu(u)"""
    return tl.where(u > 0, 1.0, value + 1.0)


@triton.jit
def live_taps(w_ptr, FIRST, LAST, Z):
    """Of w_in, for its output channels from FIRST to before LAST."""
    t = tl.arange(0, 16)
    found = tl.zeros([16, 256], tl.int32)
    for n0 in range(FIRST * Z, LAST * Z, 256):
        n = n0 + tl.arange(0, 256)
        at = (t * Z)[:, None] + (n // Z * 9 * Z + n % Z)[None, :]
        value = tl.load(w_ptr + at, mask=(t < 9)[:, None] & (n < LAST * Z)[None, :], other=0.0)
        found |= (value != 0).to(tl.int32)
    return tl.sum(tl.max(found, 1) << t, 0)


@triton.jit
def take_taps(w_ptr, taps_ptr, e, column, E, PITCH: tl.constexpr):
    """Copies w_dw of the channels e to columns of the scratch; their live taps."""
    t = tl.arange(0, 32)
    at = t[:, None] + (e * 25)[None, :]
    value = tl.load(w_ptr + at, mask=(t < 25)[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
    tl.store(taps_ptr + t[:, None] * PITCH + column[None, :], value)
    return tl.sum(tl.max((value != 0).to(tl.int32), 1) << t, 0)


@triton.jit
def reach(live):
    """(above, below): rows that the live taps of the 5x5 kernel reach."""
    above = tl.where(live & 31 != 0, 2, tl.where(live & (31 << 5) != 0, 1, 0))
    return above, tl.where(live & (31 << 20) != 0, 2, tl.where(live & (31 << 15) != 0, 1, 0))


@triton.jit
def corner(tile, H, W, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """First image, row and column of a tile."""
    across, down = tl.cdiv(W, TILE_W), tl.cdiv(H, TILE_H)
    return tile // (across * down) * TILE_N, tile // across % down * TILE_H, tile % across * TILE_W


@triton.jit
def area_of(start, above, below, BESIDE: tl.constexpr, IMAGES, H, W, TILE_N: tl.constexpr, TILE_H: tl.constexpr,
            TILE_W: tl.constexpr):  # fmt: skip
    """A tile with so many rows and columns around it, as far as there are any."""
    n, h, w = start
    top, left = tl.maximum(h - above, 0), tl.maximum(w - BESIDE, 0)
    height = tl.minimum(h + TILE_H + below, H) - top
    return top, left, tl.minimum(TILE_N, IMAGES - n), height, tl.minimum(w + TILE_W + BESIDE, W) - left


@triton.jit
def size_of(area):
    return area[2] * area[3] * area[4]


@triton.jit
def locate(i, n0, area, home, H, W, WIDE: tl.constexpr):
    """(row of the images' memory, row of the scratch, h, w, whether there is such a pixel) of pixels i of an area; the scratch
    holds the area `home`."""
    top, left, images, height, width = area
    n, h, w = i // (height * width), top + i // width % height, left + i % width
    row = (n * home[3] + h - home[0]) * home[4] + w - home[1]
    return (offset_of(n0 + n, WIDE) * H + h) * W + w, row, h, w, i < images * height * width


@triton.jit
def within(inside, h, w, H, W):
    return inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)


@triton.jit
def load_channels(ptr, m, inside, c, Z):
    """[PIXELS, channels c] of an image."""
    at = m[:, None] * Z + c[None, :]
    return tl.load(ptr + at, mask=inside[:, None] & (c < Z)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_hidden(ptr, row, inside, column, PITCH: tl.constexpr):
    return tl.load(ptr + row[:, None] * PITCH + column[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def store_hidden(ptr, row, inside, column, value, PITCH: tl.constexpr):
    tl.store(ptr + row[:, None] * PITCH + column[None, :], value.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def load_in(w_ptr, t, e, c, E, Z):
    """[channels e, channels c] of a tap of w_in."""
    return tl.load(w_ptr + (e * 9 + t)[:, None] * Z + c[None, :], mask=(e < E)[:, None] & (c < Z)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def load_out(w_ptr, e, c, E, Z):
    """[channels c, channels e] of w_out"""
    mask = (c < Z)[:, None] & (e < E)[None, :]
    return tl.load(w_ptr + c[:, None] * E + e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def first_conv(z_ptr, w_ptr, live, m, h, w, inside, e, H, W, Z, E, PRECISION: tl.constexpr,
               BLOCK_K: tl.constexpr):  # fmt: skip
    """[PIXELS, channels e] of conv3x3(z), live taps alone."""
    total = tl.zeros([m.shape[0], e.shape[0]], tl.float32)
    for t in range(9):
        if live >> t & 1 != 0:
            dh, dw = t // 3 - 1, t % 3 - 1
            seen = within(inside, h + dh, w + dw, H, W)
            for c0 in range(0, Z, BLOCK_K):
                c = c0 + tl.arange(0, BLOCK_K)
                near = load_channels(z_ptr, m + (dh * W + dw), seen, c, Z)
                weight = load_in(w_ptr, t, e, c, E, Z)
                total = tl.dot(near, tl.trans(weight), total, input_precision=PRECISION)
    return total


@triton.jit
def depthwise(map_ptr, taps_ptr, live, row, h, w, inside, column, width, H, W, SIGN: tl.constexpr, PITCH: tl.constexpr):
    """[PIXELS, columns] of the 5x5 convolution of a map in the scratch, live taps alone; SIGN -1: transposed."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for down in range(5):
        if live >> (5 * down) & 31 != 0:
            for across in tl.static_range(5):
                t = 5 * down + across
                dh, dw = SIGN * (down - 2), SIGN * (across - 2)
                seen = within(inside, h + dh, w + dw, H, W) & (live >> t & 1 != 0)
                moved = load_hidden(map_ptr, row + (dh * width + dw), seen, column, PITCH)
                total += moved * tl.load(taps_ptr + t * PITCH + column)[None, :]
    return total


@triton.jit
def flow_cell_fwd_kernel(z_ptr, w_in_ptr, w_dw_ptr, w_out_ptr, bias_ptr, y_ptr, h1_ptr, taps_ptr, IMAGES, H, W, Z, E, TILES,
                         SPACE, PRECISION: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PITCH: tl.constexpr,
                         PIXELS: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                         BLOCK_Z: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
                         BLOCK_H: tl.constexpr):  # fmt: skip
    """y = z - (conv1x1(h2) + bias), h2 = elu(elu(depthwise5x5(h1))), h1 = elu(conv3x3(z)); BLOCK_H channels of h1 at a time."""
    task, c, Z = tl.program_id(0), tl.arange(0, BLOCK_Z), multiple(Z, UNIT)
    h1_ptr += task.to(tl.int64) * SPACE * PITCH
    taps_ptr += task.to(tl.int64) * 32 * PITCH
    live_in, live = live_taps(w_in_ptr, 0, E, Z), 0
    for e0 in range(0, E, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        live |= take_taps(w_dw_ptr, taps_ptr, e, e, E, PITCH)
    above, below = reach(live)
    bias = load_row(bias_ptr, 0, c, Z).to(tl.float32)
    for tile in range(task, TILES, tl.num_programs(0)):
        start = corner(tile, H, W, TILE_N, TILE_H, TILE_W)
        home = area_of(start, above, below, 2, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        for i0 in range(0, size_of(home), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], home, home, H, W, WIDE)
            for e0 in range(0, PITCH, BLOCK_H):
                e = e0 + tl.arange(0, BLOCK_H)
                a1 = first_conv(z_ptr, w_in_ptr, live_in, m, h, w, inside, e, H, W, Z, E, PRECISION, BLOCK_K)
                store_hidden(h1_ptr, row, inside, e, elu(a1), PITCH)
        tl.debug_barrier()
        area = area_of(start, 0, 0, 0, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        for i0 in range(0, size_of(area), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], area, home, H, W, WIDE)
            total = tl.zeros([PIXELS, BLOCK_Z], tl.float32)
            for e0 in range(0, E, BLOCK_E):
                e = e0 + tl.arange(0, BLOCK_E)
                h2 = elu(elu(depthwise(h1_ptr, taps_ptr, live, row, h, w, inside, e, home[4], H, W, 1, PITCH)))
                weight = load_out(w_out_ptr, e, c, E, Z)
                total = tl.dot(h2, tl.trans(weight), total, input_precision=PRECISION)
            y = load_channels(z_ptr, m, inside, c, Z) - (total + bias[None, :])
            at = m[:, None] * Z + c[None, :]
            tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (c < Z)[None, :])
        tl.debug_barrier()
