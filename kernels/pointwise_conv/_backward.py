"""pointwise_conv's backward on a GPU: one kernel, whose first programs take the weight's gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import add_parts, join_tile, joined_sums
from nvae_fast.kernels._tile import (
    MEAN,
    SCALE,
    SHIFT,
    differentiate,
    load_pitched,
    load_row,
    load_rows,
    multiple,
    offset_of,
    store_row,
    store_rows,
)
from nvae_fast.kernels.bn_act.tables import store_gradients
from nvae_fast.kernels.pointwise_conv._device import load_activated, load_gradient


@triton.jit
def gradient_of(dy_ptr, y_ptr, c_ptr, w_ptr, m, k, M, K, N, PITCH, C_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """G W [BLOCK_M, BLOCK_K], W [N, K] of rows that are PITCH values apart"""
    du = tl.zeros([m.shape[0], k.shape[0]], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        g = load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS)
        du = tl.dot(g, load_pitched(w_ptr, n, k, N, K, PITCH), du, input_precision="ieee")
    return du


@triton.jit
def weight_gradient(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, dw_ptr, dbias_ptr, parts_ptr, tickets_ptr, task, tile, TASKS, GROUP,
                    CHUNK, n0, k, M, K, N, PITCH, SIZE, C_ROWS: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """dw [N, K] of rows that are PITCH values apart: G^T A over the CHUNK rows of each task; dbias [N]: the sums of G, by the
    programs of column 0. Parts [TASKS + groups, SIZE] of several tasks, dbias behind dw, are joined by the last program of a
    tile."""
    first = offset_of(task, WIDE) * CHUNK
    m, n = first + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, k.shape[0]], tl.float32)
    if dbias_ptr is not None:
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, tl.minimum(M - first, CHUNK).to(tl.int32), BLOCK_M):
        g = load_gradient(dy_ptr, y_ptr, c_ptr, m, n, M, N, C_ROWS)
        if c_ptr is not None:
            g = tl.where((m < M)[:, None], g, 0.0)  # c2 stands in rows past the end
        if dbias_ptr is not None:
            sums += g.to(tl.float32)
        a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
        total = tl.dot(tl.trans(g), a, total, input_precision="ieee")
        m += BLOCK_M
    at, inside = n[:, None] * PITCH + k[None, :], (n < N)[:, None] & (k < K)[None, :]
    if parts_ptr is None:
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=inside)
        if dbias_ptr is not None:
            if tl.min(k, 0) == 0:
                store_row(dbias_ptr, 0, n, N, tl.sum(sums, 0))
    else:
        mine = parts_ptr + task.to(tl.int64) * SIZE
        tl.store(mine + at, total, mask=inside)
        if dbias_ptr is not None:
            if tl.min(k, 0) == 0:
                store_row(mine + N * PITCH, 0, n, N, tl.sum(sums, 0))
        if join_tile(parts_ptr, tickets_ptr, dw_ptr, task, tile, n0, k, N, K, PITCH, SIZE, TASKS, GROUP, BLOCK_N):
            if dbias_ptr is not None:
                if tl.min(k, 0) == 0:
                    store_row(dbias_ptr, 0, n, N, add_parts(parts_ptr + N * PITCH, 0, TASKS, n, N, SIZE))


@triton.jit
def pointwise_conv_bwd_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, beside_ptr, w_ptr, also_ptr, du_ptr, dbeside_ptr, out_ptr,
                              dw_ptr, dbias_ptr, share, dparts_ptr, dtickets_ptr, DTASKS, DGROUP, parts_ptr, tickets_ptr, TASKS,
                              GROUP, CHUNK, M, K, B, N, C_ROWS: tl.constexpr, ACT: tl.constexpr, WIDE: tl.constexpr,
                              UNIT_K: tl.constexpr, UNIT_B: tl.constexpr, UNIT_N: tl.constexpr, BLOCK_M: tl.constexpr,
                              BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_N: tl.constexpr, WEIGHT_K: tl.constexpr,
                              WEIGHT_M: tl.constexpr):  # fmt: skip
    """dw [N, K + B] and dbias, by the first programs (`weight_gradient`). du = (G W) act'(u) + also, u = x without bn, and the
    same of `beside`, whose columns follow; the table of gradients from parts [tiles, 2, K]: sum(du), sum(du (x - mean)), of du
    before it is rounded."""
    K, B, N = multiple(K, UNIT_K), multiple(B, UNIT_B), multiple(N, UNIT_N)
    pitch, program = K + B, tl.program_id(0)
    of_x = tl.maximum(tl.cdiv(K, WEIGHT_K), 1)
    across = of_x + tl.cdiv(B, WEIGHT_K)
    tiles = across * tl.cdiv(N, WEIGHT_N)
    if program < DTASKS * tiles:
        task, tile = program // tiles, program % tiles
        n0, block = tile // across * WEIGHT_N, tile % across
        size = N * pitch
        if dbias_ptr is not None:
            size += N
        if beside_ptr is not None:
            if block >= of_x:
                b = (block - of_x) * WEIGHT_K + tl.arange(0, WEIGHT_K)
                parts = dparts_ptr
                if dparts_ptr is not None:
                    parts += K
                weight_gradient(dy_ptr, y_ptr, c_ptr, beside_ptr, None, dw_ptr + K, None, parts, dtickets_ptr, task, tile,
                                DTASKS, DGROUP, CHUNK, n0, b, M, B, N, pitch, size, C_ROWS, ACT, WIDE, WEIGHT_N,
                                WEIGHT_M)  # fmt: skip
                return
        k = block * WEIGHT_K + tl.arange(0, WEIGHT_K)
        weight_gradient(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, dw_ptr, dbias_ptr, dparts_ptr, dtickets_ptr, task, tile, DTASKS,
                        DGROUP, CHUNK, n0, k, M, K, N, pitch, size, C_ROWS, ACT, WIDE, WEIGHT_N, WEIGHT_M)  # fmt: skip
        return
    program, of_x = program - DTASKS * tiles, tl.maximum(tl.cdiv(K, BLOCK_K), 1)
    across = of_x + tl.cdiv(B, BLOCK_K)
    tile, block = program // across, program % across
    m = offset_of(tile, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    if beside_ptr is not None:
        if block >= of_x:
            b = (block - of_x) * BLOCK_K + tl.arange(0, BLOCK_K)
            du = gradient_of(dy_ptr, y_ptr, c_ptr, w_ptr + K, m, b, M, B, N, pitch, C_ROWS, BLOCK_N)
            if ACT:
                du = differentiate(du, load_rows(beside_ptr, m, b, M, B), ACT)
            store_rows(dbeside_ptr, m, b, M, B, du)
            return
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    du = gradient_of(dy_ptr, y_ptr, c_ptr, w_ptr, m, k, M, K, N, pitch, C_ROWS, BLOCK_N)
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
