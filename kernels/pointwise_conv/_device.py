"""pointwise_conv's operands and products of tiles on a GPU; what they are for stands in triton.py."""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import GROUPS, join_mean
from nvae_fast.kernels._tile import SCALE, SHIFT, activate, load_pitched, load_row


@triton.jit
def tile_of(program, WIDTH, BLOCK: tl.constexpr):
    """(tile of rows, block of columns, columns) of a program: those of one tile of rows run side by side and meet in the
    second-level cache."""
    across = tl.cdiv(WIDTH, BLOCK)
    return program // across, program % across, program % across * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_activated(x_ptr, bn_ptr, m, k, M, K, ACT: tl.constexpr):
    """A = act(scale x + shift) [BLOCK_M, BLOCK_K] as stored, or act(x) without bn; columns outside are 0."""
    a = load_pitched(x_ptr, m, k, M, K, K)
    if bn_ptr is not None:
        scale, shift = load_row(bn_ptr, SCALE, k, K), load_row(bn_ptr, SHIFT, k, K)
        a = activate(a.to(tl.float32) * scale[None, :] + shift[None, :], ACT).to(x_ptr.dtype.element_ty)
    elif ACT:
        a = activate(a.to(tl.float32), ACT).to(x_ptr.dtype.element_ty)
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
def add_product(total, x_ptr, bn_ptr, w_ptr, m, n, M, K, N, PITCH, ACT: tl.constexpr, BLOCK_K: tl.constexpr):
    """total + A W^T, W [N, K] of rows that are PITCH values apart"""
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
        w = tl.load(w_ptr + n[None, :] * PITCH + k[:, None], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


@triton.jit
def store_means(y, total, m, first, tile, block, n, M, N, P, means_ptr, sums_ptr, tickets_ptr, WHOLE: tl.constexpr):
    """means [images, N] at n, of a y [BLOCK_M, BLOCK_N] that is 0 in rows past the end, and whose sum is `total`; WHOLE: whose
    tile is of one image. In sums [images + tiles, N] row image + tile has the sum of that image's rows in that tile."""
    BLOCK_M: tl.constexpr = m.shape[0]
    blocks = tl.cdiv(N, n.shape[0])
    tickets_ptr += blocks * (1 + GROUPS) + block  # behind those of the statistics
    if WHOLE:
        image, tiles = first // P, P // BLOCK_M
        first_row = image + image * tiles
        join_mean(total, means_ptr, sums_ptr, tickets_ptr + image * blocks, image, image + tile, first_row, tiles, n, N, P)
    else:
        last = tl.minimum(first + BLOCK_M, M)
        for image in range(first // P, (last - 1) // P + 1):
            begin, end = image * P, image * P + P
            its = tl.sum(tl.where(((m >= begin) & (m < end))[:, None], y, 0.0), 0)
            # in a form that no compiler takes for 1 where P is: Triton 3.6 stops at the code that would be dead then
            begin, tiles = begin // BLOCK_M, tl.cdiv(end, BLOCK_M) - begin // BLOCK_M
            join_mean(
                its, means_ptr, sums_ptr, tickets_ptr + image * blocks, image, image + tile, image + begin, tiles, n, N, P
            )
