"""conv2d on a GPU: kernels, then launchers, of a dense 3x3 convolution of stride 1 with DILATION zeros around.

Images are rows of pixels, x [M, K], y [M, N], M = B H W; the weight is [N, 9, K]. Products of tiles (_device.py), summed in
float32. Sums over pixels are taken by tiles, or by tasks of CHUNK rows, and joined in float64 by the last (kernels/_join.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import GROUPS, NO_JOIN, join, join_tile, join_tiles, joined_stats, joined_sums
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
from nvae_fast.kernels.conv2d._device import add_taps, join_shares, map_activated, map_gradient, pixels_of
from nvae_fast.kernels.conv2d._plan import plan_taps, plan_weight, rounded
from nvae_fast.kernels.conv2d.ops import fits
from nvae_fast.kernels.pointwise_conv._device import load_activated, store_means


@triton.jit
def conv2d_fwd_kernel(x_ptr, bn_ptr, w_ptr, y_ptr, out_ptr, norm, means_ptr, sums_ptr, map_ptr, shares_ptr, share_tickets_ptr,
                      parts_ptr, tickets_ptr, TASKS, GROUP, M, K, N, H, W, ACT: tl.constexpr, DILATION: tl.constexpr,
                      WHOLE: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
                      SHARES: tl.constexpr, DEPTH: tl.constexpr, SPACE: tl.constexpr, TILE_W: tl.constexpr,
                      BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """y = conv(A, W). out [2, N], mean and variance of y as stored, or [5, N] (`store_stats`), of parts [tiles, 2, N]: a tile's
    mean and sum of squares about it. means [images, N], of y over each image (`store_means`)."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    program, share, across = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES, tl.cdiv(N, BLOCK_N)
    tile, block, k0 = program // across, program % across, share * DEPTH
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    if map_ptr is not None:
        map_ptr += tl.program_id(0).to(tl.int64) * SPACE * DEPTH
        map_activated(map_ptr, x_ptr, bn_ptr, tile, k0, M, K, H, W, ACT, DILATION, WIDE, DEPTH, SPACE, TILE_W, BLOCK_M, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = add_taps(total, map_ptr, x_ptr, w_ptr, tile, k0, n, H, W, K, N, False, DILATION, WIDE, DEPTH, TILE_W, BLOCK_K)
    if SHARES > 1:
        shares_ptr += program.to(tl.int64) * SHARES * BLOCK_M * BLOCK_N
        last, total = join_shares(total, shares_ptr, share_tickets_ptr + across * (1 + GROUPS) + program, share, SHARES)
        if not last:
            return
    y = total.to(y_ptr.dtype.element_ty)
    m, _, _ = pixels_of(tile, H, W, TILE_W, BLOCK_M, WIDE)
    store_rows(y_ptr, m, n, M, N, y)
    if (parts_ptr is not None) or (means_ptr is not None):
        y = y.to(tl.float32)
        total = tl.sum(y, 0)
    if parts_ptr is not None:
        mean = total / BLOCK_M
        d = y - mean[None, :]
        parts = parts_ptr + offset_of(tile, WIDE) * 2 * N
        store_row(parts, 0, n, N, mean)
        store_row(parts, 1, n, N, tl.sum(d * d, 0))
    if means_ptr is not None:  # a tile's patches follow each other, as those of an image do; tickets behind those of the shares
        first = offset_of(tile, WIDE) * BLOCK_M
        if SHARES > 1:
            tickets_of_images = tickets_ptr + tl.num_programs(0) // SHARES
        else:
            tickets_of_images = tickets_ptr
        store_means(y, total, first + tl.arange(0, BLOCK_M), first, tile, block, n, M, N, H * W, means_ptr, sums_ptr,
                    tickets_of_images, WHOLE)  # fmt: skip
    if parts_ptr is not None:
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
def conv2d_du_kernel(dy_ptr, y_ptr, c_ptr, x_ptr, bn_ptr, w_ptr, du_ptr, g_ptr, a_ptr, out_ptr, share_of_mean, map_ptr,
                     shares_ptr, share_tickets_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, M, K, N, H, W, C_ROWS: tl.constexpr,
                     ACT: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr, UNIT_N: tl.constexpr,
                     SHARES: tl.constexpr, DEPTH: tl.constexpr, SPACE: tl.constexpr, TILE_W: tl.constexpr,
                     PITCH_G: tl.constexpr, PITCH_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                     BLOCK_K: tl.constexpr):  # fmt: skip
    """du = (transposed conv of g) act'(u), u = x without bn; the table of gradients from parts [tiles, 2, K]: sum(du),
    sum(du (x - mean)), of du before it is rounded. Leaves g [M, PITCH_G], unless it is dy, and A [M, PITCH_A], unless it is
    x."""
    K, N = multiple(K, UNIT_K), multiple(N, UNIT_N)
    program, share, across = tl.program_id(0) // SHARES, tl.program_id(0) % SHARES, tl.cdiv(K, BLOCK_K)
    tile, block, n0 = program // across, program % across, share * DEPTH
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    if map_ptr is not None:
        map_ptr += tl.program_id(0).to(tl.int64) * SPACE * DEPTH
        map_gradient(map_ptr, g_ptr, block == 0, dy_ptr, y_ptr, c_ptr, tile, n0, M, N, H, W, C_ROWS, DILATION, WIDE, DEPTH,
                     SPACE, TILE_W, PITCH_G, BLOCK_M, BLOCK_N)  # fmt: skip
    m, _, _ = pixels_of(tile, H, W, TILE_W, BLOCK_M, WIDE)
    if a_ptr is not None:  # before the products, whose sums take the registers
        if share == 0:
            a = load_activated(x_ptr, bn_ptr, m, k, M, K, ACT)
            tl.store(a_ptr + m[:, None] * PITCH_A + k[None, :], a, mask=(k < PITCH_A)[None, :])
        tl.debug_barrier()
    du = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    du = add_taps(du, map_ptr, dy_ptr, w_ptr, tile, n0, k, H, W, N, K, True, DILATION, WIDE, DEPTH, TILE_W, BLOCK_N)
    if SHARES > 1:
        shares_ptr += program.to(tl.int64) * SHARES * BLOCK_M * BLOCK_K
        last, du = join_shares(du, shares_ptr, share_tickets_ptr + across * (1 + GROUPS) + program, share, SHARES)
        if not last:
            return
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
            store_gradients(out_ptr, bn_ptr, total, moment, share_of_mean, k, K)


@triton.jit
def conv2d_dweight_kernel(g_ptr, a_ptr, dw_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, CHUNK, M, K, N,
                          H: tl.constexpr, W: tl.constexpr, DILATION: tl.constexpr, WIDE: tl.constexpr, UNIT_K: tl.constexpr,
                          UNIT_N: tl.constexpr, PITCH_G: tl.constexpr, PITCH_A: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """dw [N, 9, K] = G^T A of every tap, A moved by it and 0 outside the image, from parts [tasks, N, 9, K] of CHUNK rows each;
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
    at = (n * (9 * K))[:, None] + (tap * K + k)[None, :]
    if parts_ptr is None:
        tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(parts_ptr + task.to(tl.int64) * (9 * N * K) + at, total, mask=inside)
        join_tile(parts_ptr + tap * K, tickets_ptr, dw_ptr + tap * K, task, tile, n0, k, N, K, 9 * K, 9 * N * K, TASKS, GROUP,
                  BLOCK_N)  # fmt: skip


def conv2d_fwd(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, dilation: int, stats: bool, means: bool = False,
               *norm: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, w, sizes = _arguments(x, weight, dilation)
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    bn, y = _triton.floats("coefficients", bn, 5, fan), empty_image(x, x.shape[0], out, *x.shape[2:])
    images, pixels = x.shape[0], sizes["H"] * sizes["W"]
    found = [x.new_empty(n, out, dtype=torch.float32) for n in (Following(*norm).rows(stats), images if means else 0)]
    if not y.numel():
        return y, zero_stats(x, out, stats, norm, rows), found[1].zero_()
    plan = plan_taps(x, out, fan, dilation, mapped=bn is not None or act > 0)
    tiles, across = rows // plan.block_m, triton.cdiv(out, plan.block_n)
    parts, sums = NO_JOIN, None
    if stats or means:
        more = images + (tiles if plan.options["SHARES"] > 1 else 0)
        parts = join(x, tiles, out, across, more if means else 0)
    if means:
        sums = x.new_empty(images + tiles, out, dtype=torch.float32)
    conv2d_fwd_kernel[(plan.programs,)](
        *(x, bn, w, y, found[0], following(norm, out, rows), found[1] if means else None, sums, *plan.scratch),
        *(parts if stats else parts._replace(parts=None)),
        **sizes | plan.options,
        **dict(ACT=act, DILATION=dilation, WHOLE=means and pixels % plan.block_m == 0, WIDE=_wide(x, y)),
        **dict(BLOCK_N=plan.block_n, BLOCK_K=plan.block_k),
    )
    return y, *found


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
    plan = plan_taps(x, fan, out, dilation, mapped=c is not None)
    changed = bn is not None or act > 0
    g = dy if c is None else x.new_empty(rows, rounded(out))
    a = x.new_empty(rows, rounded(fan)) if changed else x
    wide = any(map(_triton.wide, (x, dy, a, g)))
    parts = NO_JOIN if bn is None else join(x, rows // plan.block_m, fan, triton.cdiv(fan, plan.block_n))
    conv2d_du_kernel[(plan.programs,)](
        *(dy, y, c, x, bn, w, du, None if c is None else g, a if changed else None, table, share(count)),
        *(*plan.scratch, *parts),
        **sizes | plan.options,
        **dict(C_ROWS=0 if c is None else len(c), ACT=act, DILATION=dilation, WIDE=wide),
        **dict(BLOCK_N=plan.block_k, BLOCK_K=plan.block_n, PITCH_G=g.shape[1], PITCH_A=a.shape[1]),
    )
    _dweight(g, a, dweight, sizes, dilation, wide)
    return du, dweight, table


def _dweight(g: Tensor, a: Tensor, dweight: Tensor, sizes: dict[str, int], dilation: int, wide: bool) -> None:
    """By tasks of rows, of which the last joins what all have of a tile of the weight"""
    rows, fan, out = sizes["M"], sizes["K"], sizes["N"]
    tiles, tasks, chunk, options = plan_weight(a, rows, out, fan)
    dense = dweight.is_contiguous(memory_format=torch.channels_last)
    found = dweight if dense else torch.empty_like(dweight, memory_format=torch.channels_last)
    conv2d_dweight_kernel[(tiles * tasks,)](
        *(
            g,
            a,
            found,
            *join_tiles(a, tasks, dweight.numel(), tiles, NO_JOIN, 0),
            chunk,
            rows,
            fan,
            out,
            sizes["H"],
            sizes["W"],
        ),
        **dict(DILATION=dilation, WIDE=wide, UNIT_K=sizes["UNIT_K"], UNIT_N=sizes["UNIT_N"]),
        **dict(PITCH_G=g.shape[1], PITCH_A=a.shape[1]),
        **options,
    )
    if not dense:
        dweight.copy_(found)


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
