"""The kernels of flow_cell on a GPU; README.md has the plan, triton.py the launchers.

A program has a tile of PIXELS pixels, [images, TILE_H, TILE_W], times BLOCK_E hidden channels. Hidden maps are rows
[pixels, PITCH], float32 or bfloat16, with zeros in the channels from E on. Packed weights, float32 (`flow_cell_pack_kernel`):

    w_in [9 Z, PITCH]: row t Z + c, tap t, so that the three taps of a row of the kernel meet 3 Z neighbours in z's memory
    w_dw [25, PITCH]    w_out [PITCH, BLOCK_Z]    live [9 + 25]: whether a tap is anything but 0

Dots take float32 at PRECISION, a name of Triton's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._tile import load_row, offset_of


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
def locate(tile, IMAGES, H, W, WIDE: tl.constexpr, PIXELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(row of memory, h, w, whether it is in the images) of a tile's pixels."""
    i = tl.arange(0, PIXELS)
    across, down = tl.cdiv(W, TILE_W), tl.cdiv(H, TILE_H)
    w = tile % across * TILE_W + i % TILE_W
    h = tile // across % down * TILE_H + i // TILE_W % TILE_H
    n = tile // (across * down) * (PIXELS // (TILE_H * TILE_W)) + i // (TILE_H * TILE_W)
    return (offset_of(n, WIDE) * H + h) * W + w, h, w, (n < IMAGES) & (h < H) & (w < W)


@triton.jit
def load_moved(ptr, m, h, w, inside, dh, dw, e, H, W, PITCH: tl.constexpr):
    """[PIXELS, BLOCK_E] of a hidden map at (h + dh, w + dw), 0 outside of the image."""
    inside = inside & (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
    return tl.load(ptr + (m + (dh * W + dw))[:, None] * PITCH + e[None, :], mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def load_near(z_ptr, live_table, m, h, w, inside, dh, k, H, W, Z, ALL: tl.constexpr):
    """[PIXELS, BLOCK_K] of z in row h + dh: k = (dw + 1) Z + c. 0 outside of the image and, unless ALL, under dead taps."""
    dw = k // Z - 1
    rows = inside & (h + dh >= 0) & (h + dh < H)
    columns = w[:, None] + dw[None, :]
    mask = rows[:, None] & (columns >= 0) & (columns < W) & (k < 3 * Z)[None, :]
    if not ALL:
        live = tl.load(live_table + 3 * (dh + 1) + dw + 1, mask=k < 3 * Z, other=0)
        mask = mask & (live != 0)[None, :]
    return tl.load(z_ptr + (m + dh * W)[:, None] * Z + (k - Z)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_channels(ptr, m, inside, c, Z):
    """[PIXELS, BLOCK_Z] of an image."""
    return tl.load(ptr + m[:, None] * Z + c[None, :], mask=inside[:, None] & (c < Z)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_channels(ptr, m, inside, c, Z, value):
    tl.store(ptr + m[:, None] * Z + c[None, :], value.to(ptr.dtype.element_ty), mask=inside[:, None] & (c < Z)[None, :])


@triton.jit
def store_hidden(ptr, m, inside, e, value, PITCH: tl.constexpr):
    tl.store(ptr + m[:, None] * PITCH + e[None, :], value.to(ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def depthwise(h1_ptr, w_dw_ptr, live_table, m, h, w, inside, e, H, W, PITCH: tl.constexpr, BLOCK_E: tl.constexpr):
    """[PIXELS, BLOCK_E] of depthwise5x5(h1), live taps alone."""
    total = tl.zeros([m.shape[0], BLOCK_E], tl.float32)
    for t in range(25):
        if tl.load(live_table + 9 + t) != 0:
            moved = load_moved(h1_ptr, m, h, w, inside, t // 5 - 2, t % 5 - 2, e, H, W, PITCH)
            total += moved * tl.load(w_dw_ptr + t * PITCH + e)[None, :]
    return total


@triton.jit
def flow_cell_pack_kernel(w_in_ptr, w_dw_ptr, w_out_ptr, packed_in_ptr, packed_dw_ptr, packed_out_ptr, live_table, Z, E, I0, I1,
                          I2, I3, D0, D2, D3, O0, O1, PITCH: tl.constexpr, BLOCK_Z: tl.constexpr,
                          BLOCK_E: tl.constexpr):  # fmt: skip
    """A program packs a tap of w_in or w_dw, the last one w_out. I, D, O: their strides."""
    task, c = tl.program_id(0), tl.arange(0, BLOCK_Z)
    live = 0
    for e0 in range(0, PITCH, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        inside = (c < Z)[:, None] & (e < E)[None, :]
        if task < 9:
            at = c[:, None] * I1 + e[None, :] * I0 + (task // 3 * I2 + task % 3 * I3)
            value = tl.load(w_in_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(packed_in_ptr + (task * Z + c)[:, None] * PITCH + e[None, :], value, mask=(c < Z)[:, None])
            live = tl.maximum(live, tl.max(tl.max((value != 0).to(tl.int32), 1), 0))
        elif task < 34:
            t = task - 9
            row = tl.load(w_dw_ptr + e * D0 + (t // 5 * D2 + t % 5 * D3), mask=e < E, other=0.0).to(tl.float32)
            tl.store(packed_dw_ptr + t * PITCH + e, row)
            live = tl.maximum(live, tl.max((row != 0).to(tl.int32), 0))
        else:
            value = tl.load(w_out_ptr + c[:, None] * O0 + e[None, :] * O1, mask=inside, other=0.0).to(tl.float32)
            tl.store(packed_out_ptr + e[None, :] * BLOCK_Z + c[:, None], value)
    tl.store(live_table + task, live, mask=task < 34)


@triton.jit
def flow_cell_hidden_kernel(z_ptr, w_in_ptr, live_table, h1_ptr, IMAGES, H, W, Z, PRECISION: tl.constexpr, WIDE: tl.constexpr,
                            PITCH: tl.constexpr, PIXELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                            BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """h1 = elu(conv3x3(z))"""
    m, h, w, inside = locate(tl.program_id(0), IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([PIXELS, BLOCK_E], tl.float32)
    for row in range(3):
        taps = live_table + 3 * row
        if (tl.load(taps) | tl.load(taps + 1) | tl.load(taps + 2)) != 0:
            for k0 in range(0, 3 * Z, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                near = load_near(z_ptr, live_table, m, h, w, inside, row - 1, k, H, W, Z, False)
                at = (row * 3 * Z + k)[:, None] * PITCH + e[None, :]
                weight = tl.load(w_in_ptr + at, mask=(k < 3 * Z)[:, None], other=0.0)
                total = tl.dot(near, weight, total, input_precision=PRECISION)
    store_hidden(h1_ptr, m, inside, e, elu(total), PITCH)


@triton.jit
def flow_cell_fwd_kernel(z_ptr, h1_ptr, w_dw_ptr, w_out_ptr, live_table, bias_ptr, y_ptr, IMAGES, H, W, Z,
                         PRECISION: tl.constexpr, WIDE: tl.constexpr, PITCH: tl.constexpr, PIXELS: tl.constexpr,
                         TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_Z: tl.constexpr,
                         BLOCK_E: tl.constexpr):  # fmt: skip
    """y = z - (conv1x1(h2) + bias), h2 = elu(elu(depthwise5x5(h1)))"""
    m, h, w, inside = locate(tl.program_id(0), IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
    c = tl.arange(0, BLOCK_Z)
    total = tl.zeros([PIXELS, BLOCK_Z], tl.float32)
    for e0 in range(0, PITCH, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        h2 = elu(elu(depthwise(h1_ptr, w_dw_ptr, live_table, m, h, w, inside, e, H, W, PITCH, BLOCK_E)))
        weight = tl.load(w_out_ptr + e[:, None] * BLOCK_Z + c[None, :])
        total = tl.dot(h2, weight, total, input_precision=PRECISION)
    total += load_row(bias_ptr, 0, c, Z).to(tl.float32)[None, :]
    store_channels(y_ptr, m, inside, c, Z, load_channels(z_ptr, m, inside, c, Z) - total)
