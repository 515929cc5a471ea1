"""The backward kernels of flow_cell on a GPU (layouts: _device.py). A task is TILES tiles; its sums over pixels are rows:

parts_in [tasks, 9 Z, PITCH]: of w_in    parts [tasks, 25 + Z + 1, WIDTH]: of w_dw, w_out, bias
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels.flow_cell._device import (
    depthwise,
    elu,
    load_channels,
    load_moved,
    load_near,
    locate,
    slope,
    store_channels,
    store_hidden,
)


@triton.jit
def flow_cell_da2_kernel(dy_ptr, h1_ptr, w_dw_ptr, w_out_ptr, live_table, da2_ptr, parts_ptr, IMAGES, H, W, Z, TILES, LAST,
                         WIDTH, PRECISION: tl.constexpr, WIDE: tl.constexpr, PITCH: tl.constexpr, PIXELS: tl.constexpr,
                         TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """da2 = -(w_out^T dy) elu'(elu(a2)) elu'(a2), a2 = depthwise5x5(h1); the gradients of w_out and bias."""
    task, c = tl.program_id(0), tl.arange(0, BLOCK_Z)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    d_out = tl.zeros([BLOCK_Z, BLOCK_E], tl.float32)
    d_bias = tl.zeros([BLOCK_Z], tl.float32)
    for tile in range(task * TILES, tl.minimum(task * TILES + TILES, LAST)):
        m, h, w, inside = locate(tile, IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
        g = load_channels(dy_ptr, m, inside, c, Z)
        a2 = depthwise(h1_ptr, w_dw_ptr, live_table, m, h, w, inside, e, H, W, PITCH, BLOCK_E)
        inner = elu(a2)
        h2 = elu(inner)
        weight = tl.load(w_out_ptr + e[None, :] * BLOCK_Z + c[:, None])
        dh2 = tl.dot(g, weight, input_precision=PRECISION)
        store_hidden(da2_ptr, m, inside, e, -dh2 * slope(inner, h2) * slope(a2, inner), PITCH)
        d_bias += tl.sum(g, 0)
        d_out = tl.dot(tl.trans(g), h2, d_out, input_precision=PRECISION)
    rows = parts_ptr + (task * (25 + Z + 1) + 25) * WIDTH
    tl.store(rows + c[:, None] * WIDTH + e[None, :], -d_out, mask=(c < Z)[:, None])
    tl.store(rows + Z * WIDTH + c, -d_bias, mask=tl.program_id(1) == 0)


@triton.jit
def flow_cell_da1_kernel(da2_ptr, h1_ptr, w_dw_ptr, live_table, parts_ptr, IMAGES, H, W, Z, TILES, LAST, WIDTH,
                         WIDE: tl.constexpr, PITCH: tl.constexpr, PIXELS: tl.constexpr, TILE_H: tl.constexpr,
                         TILE_W: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """da1 = elu'(a1) times the depthwise backward of da2, in the place of h1; the gradient of w_dw, dead taps too."""
    task, e = tl.program_id(0), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    taps = tl.arange(0, 32)
    d_dw = tl.zeros([32, BLOCK_E], tl.float32)
    for tile in range(task * TILES, tl.minimum(task * TILES + TILES, LAST)):
        m, h, w, inside = locate(tile, IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
        h1 = load_moved(h1_ptr, m, h, w, inside, 0, 0, e, H, W, PITCH)
        dh1 = tl.zeros([PIXELS, BLOCK_E], tl.float32)
        for t in range(25):
            da2 = load_moved(da2_ptr, m, h, w, inside, 2 - t // 5, 2 - t % 5, e, H, W, PITCH)
            d_dw += tl.where((taps == t)[:, None], tl.sum(h1 * da2, 0)[None, :], 0.0)
            if tl.load(live_table + 9 + t) != 0:
                dh1 += da2 * tl.load(w_dw_ptr + t * PITCH + e)[None, :]
        store_hidden(h1_ptr, m, inside, e, dh1 * slope(h1, h1), PITCH)
    rows = parts_ptr + task * (25 + Z + 1) * WIDTH
    tl.store(rows + taps[:, None] * WIDTH + e[None, :], d_dw, mask=(taps < 25)[:, None])


@triton.jit
def flow_cell_dz_kernel(dy_ptr, da1_ptr, w_in_ptr, live_table, dz_ptr, IMAGES, H, W, Z, PRECISION: tl.constexpr,
                        WIDE: tl.constexpr, PITCH: tl.constexpr, PIXELS: tl.constexpr, TILE_H: tl.constexpr,
                        TILE_W: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """dz = dy + the transposed 3x3 convolution of da1."""
    m, h, w, inside = locate(tl.program_id(0), IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
    c = tl.arange(0, BLOCK_Z)
    total = tl.zeros([PIXELS, BLOCK_Z], tl.float32)
    for t in range(9):
        if tl.load(live_table + t) != 0:
            for e0 in range(0, PITCH, BLOCK_E):
                e = e0 + tl.arange(0, BLOCK_E)
                da1 = load_moved(da1_ptr, m, h, w, inside, 1 - t // 3, 1 - t % 3, e, H, W, PITCH)
                weight = tl.load(w_in_ptr + (t * Z + c)[None, :] * PITCH + e[:, None], mask=(c < Z)[None, :], other=0.0)
                total = tl.dot(da1, weight, total, input_precision=PRECISION)
    store_channels(dz_ptr, m, inside, c, Z, load_channels(dy_ptr, m, inside, c, Z) + total)


@triton.jit
def flow_cell_dw_kernel(z_ptr, da1_ptr, parts_in_ptr, IMAGES, H, W, Z, TILES, LAST, PRECISION: tl.constexpr, WIDE: tl.constexpr,
                        PITCH: tl.constexpr, PIXELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                        BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    """The gradient of w_in, dead taps too; a program has one row of the kernel."""
    task, e = tl.program_id(0), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row, k = tl.program_id(2) % 3, tl.program_id(2) // 3 * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
    for tile in range(task * TILES, tl.minimum(task * TILES + TILES, LAST)):
        m, h, w, inside = locate(tile, IMAGES, H, W, WIDE, PIXELS, TILE_H, TILE_W)
        da1 = load_moved(da1_ptr, m, h, w, inside, 0, 0, e, H, W, PITCH)
        near = load_near(z_ptr, None, m, h, w, inside, row - 1, k, H, W, Z, True)
        total = tl.dot(tl.trans(near), da1, total, input_precision=PRECISION)
    at = (task * 9 * Z + row * 3 * Z + k)[:, None] * PITCH + e[None, :]
    tl.store(parts_in_ptr + at, total, mask=(k < 3 * Z)[:, None])


@triton.jit
def flow_cell_join_kernel(parts_in_ptr, parts_ptr, d_in_ptr, d_dw_ptr, d_out_ptr, d_bias_ptr, Z, E, TASKS_IN, TASKS, WIDTH,
                          PITCH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """A program adds one row over the tasks, in float64 and in order, and puts it where its gradient wants it."""
    row, e = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_in = row < 9 * Z
    first = parts_in_ptr + row * PITCH if of_in else parts_ptr + (row - 9 * Z) * WIDTH
    step = 9 * Z * PITCH if of_in else (25 + Z + 1) * WIDTH
    tasks = TASKS_IN if of_in else TASKS
    columns = PITCH if of_in else WIDTH
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(0, tasks, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        mask = (t < tasks)[:, None] & (e < columns)[None, :]
        total += tl.load(first + t.to(tl.int64)[:, None] * step + e[None, :], mask=mask, other=0.0).to(tl.float64)
    value = tl.sum(total, 0).to(tl.float32)
    if of_in:
        tl.store(d_in_ptr + (e * Z + row % Z) * 9 + row // Z, value.to(d_in_ptr.dtype.element_ty), mask=e < E)
    elif row < 9 * Z + 25:
        tl.store(d_dw_ptr + e * 25 + (row - 9 * Z), value.to(d_dw_ptr.dtype.element_ty), mask=e < E)
    elif row < 10 * Z + 25:
        tl.store(d_out_ptr + (row - 9 * Z - 25) * E + e, value.to(d_out_ptr.dtype.element_ty), mask=e < E)
    else:
        tl.store(d_bias_ptr + e, value.to(d_bias_ptr.dtype.element_ty), mask=e < Z)
