"""The backward kernels of flow_cell on a GPU (layouts: _device.py). A program has a block of BLOCK_E hidden channels all the
way, so that its maps are [SPACE, BLOCK_E], and leaves what adds up over blocks or over tiles:

dz_parts [blocks, pixels, Z]: the last program of a task to end adds them, those of its tiles
parts [tasks + groups, 10 Z + 26, WIDTH], rows of w_in (tap by tap), w_dw, w_out, bias: _sums.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import arrive
from nvae_fast.kernels._tile import multiple, offset_of
from nvae_fast.kernels.flow_cell._device import (
    area_of,
    corner,
    depthwise,
    elu,
    first_conv,
    live_taps,
    load_channels,
    load_hidden,
    load_in,
    load_out,
    locate,
    reach,
    size_of,
    slope,
    store_hidden,
    take_taps,
    within,
)
from nvae_fast.kernels.flow_cell._sums import join_weights


@triton.jit
def add_to(ptr, value, mask, again):
    """The same thread reads and writes a value, tile after tile."""
    tl.store(ptr, tl.load(ptr, mask=mask & again, other=0.0) + value, mask=mask)


@triton.jit
def add_taps(parts, h1_ptr, da2_ptr, start, area, home, e, again, H, W, Z, WIDTH, PIXELS: tl.constexpr, PITCH: tl.constexpr):
    """The gradient of w_dw from the pixels of a tile, dead taps too, five sums at a time: there are registers for those."""
    column = tl.arange(0, PITCH)
    for down in range(5):
        sums = tl.zeros([PIXELS, PITCH], tl.float32)
        s0, s1, s2, s3, s4 = sums, sums, sums, sums, sums
        for i0 in range(0, size_of(area), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], area, home, H, W, False)
            da2 = load_hidden(da2_ptr, row, inside, column, PITCH)
            row += (down - 2) * home[4]
            h += down - 2
            s0 += da2 * load_hidden(h1_ptr, row - 2, within(inside, h, w - 2, H, W), column, PITCH)
            s1 += da2 * load_hidden(h1_ptr, row - 1, within(inside, h, w - 1, H, W), column, PITCH)
            s2 += da2 * load_hidden(h1_ptr, row, within(inside, h, w, H, W), column, PITCH)
            s3 += da2 * load_hidden(h1_ptr, row + 1, within(inside, h, w + 1, H, W), column, PITCH)
            s4 += da2 * load_hidden(h1_ptr, row + 2, within(inside, h, w + 2, H, W), column, PITCH)
        to = parts + (9 * Z + 5 * down) * WIDTH + e
        add_to(to, tl.sum(s0, 0), e >= 0, again)
        add_to(to + WIDTH, tl.sum(s1, 0), e >= 0, again)
        add_to(to + 2 * WIDTH, tl.sum(s2, 0), e >= 0, again)
        add_to(to + 3 * WIDTH, tl.sum(s3, 0), e >= 0, again)
        add_to(to + 4 * WIDTH, tl.sum(s4, 0), e >= 0, again)


@triton.jit
def flow_cell_bwd_kernel(dy_ptr, z_ptr, w_in_ptr, w_dw_ptr, w_out_ptr, dz_ptr, dz_parts_ptr, d_in_ptr, d_dw_ptr, d_out_ptr,
                         d_bias_ptr, parts_ptr, tickets_ptr, h1_ptr, taps_ptr, IMAGES, H, W, Z, E, TILES, SPACE, I0, I1, I2, I3,
                         WIDTH, GROUP, PRECISION: tl.constexpr, WIDE: tl.constexpr,
                         UNIT: tl.constexpr, PIXELS: tl.constexpr, TILE_N: tl.constexpr, TILE_H: tl.constexpr,
                         TILE_W: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_K: tl.constexpr,
                         BLOCK_E: tl.constexpr):  # fmt: skip
    """From a task's tiles, every TASKS-th: a block's share of dz - dy and of the weights' gradients; from the last of a task's
    programs dz, and from the last of a block's the gradients (I: strides of that of w_in)."""
    task, block, tasks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    c, column, Z = tl.arange(0, BLOCK_Z), tl.arange(0, BLOCK_E), multiple(Z, UNIT)
    own = task.to(tl.int64) * tl.num_programs(1) + block
    h1_ptr += own * 2 * SPACE * BLOCK_E
    da2_ptr = h1_ptr + SPACE * BLOCK_E
    taps_ptr += own * 32 * BLOCK_E
    parts = parts_ptr + task.to(tl.int64) * (10 * Z + 26) * WIDTH
    e = block * BLOCK_E + column
    live_in = live_taps(w_in_ptr, block * BLOCK_E, tl.minimum(block * BLOCK_E + BLOCK_E, E), Z)
    live = take_taps(w_dw_ptr, taps_ptr, e, column, E, BLOCK_E)
    above, below = reach(live)
    above_in, below_in = tl.where(live_in >> 6 != 0, 1, 0), tl.where(live_in & 7 != 0, 1, 0)  # of the transposed one
    for tile in range(task, TILES, tasks):
        again = tile != task
        start = corner(tile, H, W, TILE_N, TILE_H, TILE_W)
        most, least = tl.maximum(above_in + below + above, 2), tl.maximum(below_in + above + below, 2)
        home = area_of(start, most, least, 5, IMAGES, H, W, TILE_N, TILE_H, TILE_W)

        for i0 in range(0, size_of(home), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], home, home, H, W, WIDE)
            a1 = first_conv(z_ptr, w_in_ptr, live_in, m, h, w, inside, e, H, W, Z, E, PRECISION, BLOCK_K)
            store_hidden(h1_ptr, row, inside, column, elu(a1), BLOCK_E)
        tl.debug_barrier()

        of_da2 = area_of(start, above_in + below, below_in + above, 3, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        d_out = tl.zeros([BLOCK_Z, BLOCK_E], tl.float32)
        d_bias = tl.zeros([BLOCK_Z], tl.float32)
        for i0 in range(0, size_of(of_da2), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], of_da2, home, H, W, WIDE)
            a2 = depthwise(h1_ptr, taps_ptr, live, row, h, w, inside, column, home[4], H, W, 1, BLOCK_E)
            inner = elu(a2)
            h2 = elu(inner)
            g = load_channels(dy_ptr, m, inside, c, Z)
            dh2 = tl.dot(g, load_out(w_out_ptr, e, c, E, Z), input_precision=PRECISION)
            store_hidden(da2_ptr, row, inside, column, -dh2 * slope(inner, h2) * slope(a2, inner), BLOCK_E)
            mine = inside & (h >= start[1]) & (h < start[1] + TILE_H) & (w >= start[2]) & (w < start[2] + TILE_W)
            g = tl.where(mine[:, None], g, 0.0)
            d_bias += tl.sum(g, 0)
            d_out = tl.dot(tl.trans(g), tl.where(mine[:, None], h2, 0.0), d_out, input_precision=PRECISION)
        rows = parts + (9 * Z + 25) * WIDTH
        add_to(rows + c[:, None] * WIDTH + e[None, :], -d_out, (c < Z)[:, None], again)
        add_to(rows + Z * WIDTH + c, -d_bias, (c < Z) & (block == 0), again)
        tl.debug_barrier()

        area = area_of(start, 0, 0, 0, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        add_taps(parts, h1_ptr, da2_ptr, start, area, home, e, again, H, W, Z, WIDTH, PIXELS, BLOCK_E)
        tl.debug_barrier()

        of_da1 = area_of(start, above_in, below_in, 1, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        for i0 in tl.range(0, size_of(of_da1), PIXELS, disable_licm=True):  # da1, in the place of h1
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], of_da1, home, H, W, False)
            h1 = load_hidden(h1_ptr, row, inside, column, BLOCK_E)
            dh1 = depthwise(da2_ptr, taps_ptr, live, row, h, w, inside, column, home[4], H, W, -1, BLOCK_E)
            store_hidden(h1_ptr, row, inside, column, dh1 * slope(h1, h1), BLOCK_E)
        tl.debug_barrier()

        for i0 in range(0, size_of(area), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], area, home, H, W, WIDE)
            total = tl.zeros([PIXELS, BLOCK_Z], tl.float32)
            for t in range(9):
                if live_in >> t & 1 != 0:
                    dh, dw = 1 - t // 3, 1 - t % 3
                    seen = within(inside, h + dh, w + dw, H, W)
                    da1 = load_hidden(h1_ptr, row + (dh * home[4] + dw), seen, column, BLOCK_E)
                    weight = load_in(w_in_ptr, t, e, c, E, Z)
                    total = tl.dot(da1, weight, total, input_precision=PRECISION)
            at = (offset_of(block, WIDE) * IMAGES * H * W + m)[:, None] * Z + c[None, :]
            tl.store(dz_parts_ptr + at, total, mask=inside[:, None] & (c < Z)[None, :])
        for t in tl.range(9, disable_licm=True):  # the gradient of w_in, dead taps too
            dh, dw = t // 3 - 1, t % 3 - 1
            for c0 in range(0, Z, BLOCK_K):
                k = c0 + tl.arange(0, BLOCK_K)
                d_in = tl.zeros([BLOCK_K, BLOCK_E], tl.float32)
                for i0 in range(0, size_of(area), PIXELS):
                    m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], area, home, H, W, WIDE)
                    seen = within(inside, h + dh, w + dw, H, W)
                    near = load_channels(z_ptr, m + (dh * W + dw), seen, k, Z)
                    da1 = load_hidden(h1_ptr, row, seen, column, BLOCK_E)
                    d_in = tl.dot(tl.trans(near), da1, d_in, input_precision=PRECISION)
                add_to(parts + (t * Z + k)[:, None] * WIDTH + e[None, :], d_in, (k < Z)[:, None], again)
        tl.debug_barrier()
    if arrive(tickets_ptr + task, tl.num_programs(1)):
        add_blocks(dz_parts_ptr, dy_ptr, dz_ptr, task, tl.num_programs(1), IMAGES, H, W, Z, TILES, WIDE, PIXELS, TILE_N, TILE_H,
                   TILE_W, BLOCK_Z)  # fmt: skip
    gradients = d_in_ptr, d_dw_ptr, d_out_ptr, d_bias_ptr
    join_weights(parts_ptr, tickets_ptr + tasks, gradients, (I0, I1, I2, I3), task, block, tasks, GROUP, Z, E, WIDTH, BLOCK_E)


@triton.jit
def add_blocks(dz_parts_ptr, dy_ptr, dz_ptr, task, BLOCKS, IMAGES, H, W, Z, TILES, WIDE: tl.constexpr, PIXELS: tl.constexpr,
               TILE_N: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_Z: tl.constexpr):  # fmt: skip
    """dz of a task's tiles: the shares of all blocks, in order, and dy"""
    c, pitch = tl.arange(0, BLOCK_Z), tl.cast(IMAGES, tl.int64) * H * W * Z
    for tile in range(task, TILES, tl.num_programs(0)):
        start = corner(tile, H, W, TILE_N, TILE_H, TILE_W)
        area = area_of(start, 0, 0, 0, IMAGES, H, W, TILE_N, TILE_H, TILE_W)
        for i0 in range(0, size_of(area), PIXELS):
            m, row, h, w, inside = locate(i0 + tl.arange(0, PIXELS), start[0], area, area, H, W, WIDE)
            at, mask = m[:, None] * Z + c[None, :], inside[:, None] & (c < Z)[None, :]
            share, dz = dz_parts_ptr + at, tl.zeros([PIXELS, BLOCK_Z], tl.float32)
            for _ in range(BLOCKS):
                dz += tl.load(share, mask=mask, other=0.0, cache_modifier=".cg")  # what other multiprocessors stored
                share += pitch
            dz += load_channels(dy_ptr, m, inside, c, Z)
            tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
