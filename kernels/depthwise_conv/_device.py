"""depthwise_conv on a GPU: kernels. Images are rows of pixels [M, C], of which a program has a tile at a time.

Simple rather than fast, for any kernel size: a kernel reads an image once for every tap, from the caches, so what stands before
the convolution (norm and activation; in the backward c0 dy + c1 y + c2) is stored once instead of being computed for every tap.
Sums over rows are taken by tasks of CHUNK rows in float32 and joined in float64 by the last task (kernels/_join.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import arrive, joined_stats, joined_sums
from nvae_fast.kernels._tile import (
    MEAN,
    SCALE,
    SHIFT,
    activate,
    differentiate,
    load_row,
    load_rows,
    multiple,
    offset_of,
    store_row,
    store_rows,
    store_taps,
)
from nvae_fast.kernels.bn_act.tables import store_gradients, store_stats

JOINED = tl.constexpr(8)  # parts of the weight's gradient that a program reads at a time


@triton.jit
def load_pixels(ptr, image, i, j, c, inside, H, W, C):
    """Channels c of pixel (i, j) of an image [H, W, C], 0 where not `inside`; all of shapes that broadcast together."""
    return tl.load(ptr + ((image * H + i) * W + j) * C + c, mask=inside & (c < C), other=0.0).to(tl.float32)


@triton.jit
def depthwise_conv_fwd_kernel(x_ptr, w_ptr, y_ptr, out_ptr, norm, parts_ptr, tickets_ptr, TASKS, GROUP, M, C, H, W, OUT_H,
                              OUT_W, DILATION, CHUNK, TAPS: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
                              WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
                              BLOCK_C: tl.constexpr):  # fmt: skip
    """y [., OUT_H, OUT_W, C] of x [., H, W, C], whose pixels stand UP x UP times. out [2, C], mean and variance of y as stored,
    or [5, C] (`store_stats`), of parts [tasks, 2, C]: a task's mean and sum of squares about it, from sums about the mean
    of its first tile."""
    C = multiple(C, UNIT)
    task, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = offset_of(task, WIDE) * CHUNK
    rows = tl.minimum(M - first, CHUNK).to(tl.int32)
    m = first + tl.arange(0, BLOCK_M)
    pivot = tl.zeros([BLOCK_C], tl.float32)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for done in range(0, rows, BLOCK_M):
        row = m[:, None]
        image, i, j = row // OUT_W // OUT_H, row // OUT_W % OUT_H * STRIDE, row % OUT_W * STRIDE
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for a in range(TAPS):
            h = i + (a - TAPS // 2) * DILATION
            for b in tl.static_range(TAPS):
                w = j + (b - TAPS // 2) * DILATION
                inside = (row < M) & (h >= 0) & (h < UP * H) & (w >= 0) & (w < UP * W)
                x = load_pixels(x_ptr, image, h // UP, w // UP, c[None, :], inside, H, W, C)
                total += x * load_row(w_ptr, a * TAPS + b, c, C)[None, :]
        y = total.to(y_ptr.dtype.element_ty)
        store_rows(y_ptr, m, c, M, C, y)
        if parts_ptr is not None:
            y = tl.where(row < M, y.to(tl.float32), 0.0)
            if done == 0:
                pivot = tl.sum(y, 0) / tl.minimum(rows, BLOCK_M)
            d = tl.where(row < M, y - pivot[None, :], 0.0)
            s1 += d
            s2 += d * d
        m += BLOCK_M
    if parts_ptr is not None:
        moved = tl.sum(s1, 0)
        parts = parts_ptr + offset_of(task, WIDE) * 2 * C
        store_row(parts, 0, c, C, pivot + moved / rows)
        store_row(parts, 1, c, C, tl.sum(s2, 0) - moved * moved / rows)
        done, mean, var = joined_stats(parts_ptr, tickets_ptr, task, tl.program_id(1), c, M, C, CHUNK, TASKS, GROUP)
        if done:
            store_stats(out_ptr, mean, var, tl.program_id(1), c, C, norm)


@triton.jit
def depthwise_conv_g_kernel(dy_ptr, y_ptr, c_ptr, g_ptr, w_ptr, taps_ptr, M, C, TAPS: tl.constexpr, WIDE: tl.constexpr,
                            BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """g = c0 dy + c1 y + c2, the gradient of y, and by the first programs the weight [C, TAPS^2] as taps [TAPS^2, C]."""
    m = offset_of(tl.program_id(0), WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c0, c1, c2 = load_row(c_ptr, 0, c, C), load_row(c_ptr, 1, c, C), load_row(c_ptr, 2, c, C)
    g = load_rows(dy_ptr, m, c, M, C) * c0[None, :] + load_rows(y_ptr, m, c, M, C) * c1[None, :] + c2[None, :]
    store_rows(g_ptr, m, c, M, C, g)
    if tl.program_id(0) == 0:
        store_taps(w_ptr, taps_ptr, c, C, TAPS)


@triton.jit
def load_behind(g_ptr, image, i, j, c, inside, OUT_H, OUT_W, C, STRIDE: tl.constexpr):
    """g of the outputs that lie at (i, j) of the image that was convolved; 0 where there is none."""
    inside &= (i >= 0) & (i < OUT_H * STRIDE) & (j >= 0) & (j < OUT_W * STRIDE)
    if STRIDE > 1:
        inside &= (i % STRIDE == 0) & (j % STRIDE == 0)
    return load_pixels(g_ptr, image, i // STRIDE, j // STRIDE, c, inside, OUT_H, OUT_W, C)


@triton.jit
def add_weight_gradient(g_ptr, x_ptr, bn_ptr, dw_ptr, parts_ptr, tickets_ptr, i, TASKS, M, C, H, W, OUT_H, OUT_W, DILATION,
                        CHUNK, ACT: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
                        WIDE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr,
                        BLOCK_C: tl.constexpr):  # fmt: skip
    """dw [C, TAPS^2] = sum of act(u) g behind it: program i of a block of channels takes BLOCK_T taps of a task of pixels of x.
    The last program of these taps joins parts [tasks, TAPS^2, C]."""
    ACROSS: tl.constexpr = (TAPS * TAPS + BLOCK_T - 1) // BLOCK_T
    task, c = i // ACROSS, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = i % ACROSS * BLOCK_T + tl.arange(0, BLOCK_T)
    down, right = (tap // TAPS - TAPS // 2) * DILATION, (tap % TAPS - TAPS // 2) * DILATION
    first = offset_of(task, WIDE) * CHUNK
    m = first + tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_T, BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, tl.minimum(M - first, CHUNK).to(tl.int32), BLOCK_M):
        a = load_rows(x_ptr, m, c, M, C)
        if bn_ptr is not None:
            u = a * load_row(bn_ptr, SCALE, c, C)[None, :] + load_row(bn_ptr, SHIFT, c, C)[None, :]
            a = tl.where((m < M)[:, None], activate(u, ACT), 0.0).to(x_ptr.dtype.element_ty).to(tl.float32)  # as the forward
        row = m[None, :, None]
        inside = (row < M) & (tap < TAPS * TAPS)[:, None, None]
        for copy in range(UP * UP):
            h = row // W % H * UP + copy // UP - down[:, None, None]
            w = row % W * UP + copy % UP - right[:, None, None]
            total += a[None, :, :] * load_behind(g_ptr, row // W // H, h, w, c[None, None, :], inside, OUT_H, OUT_W, C, STRIDE)
        m += BLOCK_M
    held = (tap < TAPS * TAPS)[:, None] & (c < C)[None, :]
    at = tap[:, None] * C + c[None, :]
    tl.store(parts_ptr + task.to(tl.int64) * TAPS * TAPS * C + at, tl.sum(total, 1), mask=held)
    if arrive(tickets_ptr + tl.program_id(1) * ACROSS + i % ACROSS, TASKS):
        dw = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
        for t0 in range(0, TASKS, JOINED):
            t = t0 + tl.arange(0, JOINED)
            some = parts_ptr + t.to(tl.int64)[:, None, None] * TAPS * TAPS * C + at[None, :, :]
            some = tl.load(some, mask=(t < TASKS)[:, None, None] & held[None, :, :], other=0.0, cache_modifier=".cg")
            dw += tl.sum(some.to(tl.float64), 0)
        tl.store(dw_ptr + c[None, :] * TAPS * TAPS + tap[:, None], dw.to(dw_ptr.dtype.element_ty), mask=held)


@triton.jit
def depthwise_conv_bwd_kernel(g_ptr, x_ptr, bn_ptr, w_ptr, du_ptr, out_ptr, dw_ptr, share, dparts_ptr, dtickets_ptr, DTASKS,
                              DCHUNK, parts_ptr, tickets_ptr, TASKS, GROUP, M, C, H, W, OUT_H, OUT_W, DILATION, CHUNK,
                              ACT: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, UP: tl.constexpr,
                              WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
                              BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """du = (g conv^T w) act'(u), without bn g conv^T w; the table of gradients from parts [tasks, 2, C]: sum(du), sum(du (x -
    mean)), of du as stored. The first programs take the weight's gradient."""
    C = multiple(C, UNIT)
    lead = DTASKS * ((TAPS * TAPS + BLOCK_T - 1) // BLOCK_T)
    if tl.program_id(0) < lead:
        add_weight_gradient(g_ptr, x_ptr, bn_ptr, dw_ptr, dparts_ptr, dtickets_ptr, tl.program_id(0), DTASKS, M, C, H, W, OUT_H,
                            OUT_W, DILATION, DCHUNK, ACT, TAPS, STRIDE, UP, WIDE, BLOCK_T, BLOCK_D, BLOCK_C)  # fmt: skip
        return
    task, c = tl.program_id(0) - lead, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = offset_of(task, WIDE) * CHUNK
    m = first + tl.arange(0, BLOCK_M)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, tl.minimum(M - first, CHUNK).to(tl.int32), BLOCK_M):
        row = m[:, None]
        image, i, j = row // W // H, row // W % H * UP, row % W * UP
        du = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for a in range(UP * UP * TAPS):  # of each of its UP x UP pixels, a row of taps
            h = i + a // TAPS // UP - (a % TAPS - TAPS // 2) * DILATION
            for b in tl.static_range(TAPS):
                w = j + a // TAPS % UP - (b - TAPS // 2) * DILATION
                g = load_behind(g_ptr, image, h, w, c[None, :], row < M, OUT_H, OUT_W, C, STRIDE)
                du += g * load_row(w_ptr, a % TAPS * TAPS + b, c, C)[None, :]
        if bn_ptr is not None:
            x = load_rows(x_ptr, m, c, M, C)
            scale, shift = load_row(bn_ptr, SCALE, c, C), load_row(bn_ptr, SHIFT, c, C)
            du = differentiate(du, x * scale[None, :] + shift[None, :], ACT)
            du = tl.where(row < M, du, 0.0).to(du_ptr.dtype.element_ty)
            s1 += du.to(tl.float32)
            s2 += du.to(tl.float32) * (x - load_row(bn_ptr, MEAN, c, C)[None, :])
        store_rows(du_ptr, m, c, M, C, du)
        m += BLOCK_M
    if bn_ptr is not None:
        parts = parts_ptr + offset_of(task, WIDE) * 2 * C
        store_row(parts, 0, c, C, tl.sum(s1, 0))
        store_row(parts, 1, c, C, tl.sum(s2, 0))
        done, total, moment = joined_sums(parts_ptr, tickets_ptr, task, tl.program_id(1), c, C, TASKS, GROUP)
        if done:
            store_gradients(out_ptr, bn_ptr, total, moment, share, c, C)
