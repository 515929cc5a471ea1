"""power_iteration on a GPU: two launches an iteration for all matrices, and one at the end.

A sweep program has BLOCK_K columns of one matrix, all rows of them: t = W^T u there, then its share of W t, when the columns
come from cache. A join program adds the shares of one matrix and takes the norm of the sum, by which whoever reads it divides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _lists
from nvae_fast.kernels._tile import pointer_in

BLOCK_R, BLOCK_K = 256, 32  # of the sweep's tile
BLOCK = 1024  # of a vector

# A row of the table of items: address of the matrix, sizes, where its columns' programs, its u, its v (and t) and its shares
# begin, period and step of the columns (column j in memory is number j % PERIOD * STEP + j // PERIOD), aligned rows.
MATRIX, ROWS, COLUMNS, FIRST_JOB, U, V, SHARES, PERIOD, STEP, ALIGNED = (tl.constexpr(i) for i in range(10))
FIELDS = tl.constexpr(10)


@triton.jit
def norm_of(squares, eps):
    """max(norm, eps), NaN for NaN."""
    norm = tl.sqrt(tl.sum(squares.to(tl.float64), 0)).to(tl.float32)
    return tl.where(norm <= eps, eps, norm)


@triton.jit
def logical(item, j):
    """The number of a column from its place in memory."""
    period = tl.load(item + PERIOD)
    return j % period * tl.load(item + STEP) + j // period


@triton.jit
def find_columns(jobs_table, items_table, BLOCK_K: tl.constexpr):
    """The item of this program, its block of columns, and the columns."""
    item = items_table + tl.load(jobs_table + tl.program_id(0)) * FIELDS
    block = tl.program_id(0) - tl.load(item + FIRST_JOB)
    return item, block, (block * BLOCK_K).to(tl.int32) + tl.arange(0, BLOCK_K)


@triton.jit
def sweep(item, block, j, u_ptr, t_ptr, shares_ptr, divisor, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, columns = tl.load(item + ROWS).to(tl.int32), tl.load(item + COLUMNS).to(tl.int32)
    if WIDE:
        columns = tl.multiple_of(columns, 4)
    w_ptr, u = pointer_in(item, MATRIX, tl.float32, WIDE), u_ptr + tl.load(item + U)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for r0 in range(0, rows, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & (j < columns)[None, :]
        w = tl.load(w_ptr + r.to(tl.int64)[:, None] * columns + j[None, :], mask=mask, other=0.0, eviction_policy="evict_last")
        total += w * tl.load(u + r, mask=r < rows, other=0.0)[:, None]
    t = tl.sum(total, 0) / divisor
    tl.store(t_ptr + tl.load(item + V) + j, t, mask=j < columns)
    if shares_ptr is not None:
        share = shares_ptr + tl.load(item + SHARES) + block * rows
        for r0 in range(0, rows, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            mask = (r < rows)[:, None] & (j < columns)[None, :]
            w = tl.load(
                w_ptr + r.to(tl.int64)[:, None] * columns + j[None, :], mask=mask, other=0.0, eviction_policy="evict_first"
            )
            tl.store(share + r, tl.sum(w * t[None, :], 1), mask=r < rows)


@triton.jit
def power_iteration_sweep_kernel(jobs_table, items_table, u_ptr, norms_ptr, t_ptr, shares_ptr, BLOCK_R: tl.constexpr,
                                 BLOCK_K: tl.constexpr):  # fmt: skip
    """t = W^T u, u divided by its norm unless norms_ptr is None; shares of W t unless shares_ptr is."""
    item, block, j = find_columns(jobs_table, items_table, BLOCK_K)
    divisor = 1.0
    if norms_ptr is not None:
        divisor = tl.load(norms_ptr + tl.load(jobs_table + tl.program_id(0)))
    if tl.load(item + ALIGNED) != 0:
        sweep(item, block, j, u_ptr, t_ptr, shares_ptr, divisor, True, BLOCK_R, BLOCK_K)
    else:
        sweep(item, block, j, u_ptr, t_ptr, shares_ptr, divisor, False, BLOCK_R, BLOCK_K)


@triton.jit
def power_iteration_join_kernel(items_table, t_ptr, shares_ptr, s_ptr, norms_ptr, eps, BLOCK_K: tl.constexpr,
                                BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """s = W v = the sum of the shares, in order, divided by the norm of t; norms [items, 2], of s and of t."""
    item = items_table + tl.program_id(0).to(tl.int64) * FIELDS
    rows, columns = tl.load(item + ROWS).to(tl.int32), tl.load(item + COLUMNS).to(tl.int32)
    t = t_ptr + tl.load(item + V)
    squares = tl.zeros([BLOCK], tl.float32)
    for i0 in range(0, columns, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        here = tl.load(t + i, mask=i < columns, other=0.0)
        squares += here * here
    divisor = norm_of(squares, eps)
    shares, blocks = shares_ptr + tl.load(item + SHARES), tl.cdiv(columns, BLOCK_K)
    squares = tl.zeros([BLOCK_C], tl.float32)
    for r0 in range(0, rows, BLOCK_C):
        r = r0 + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        for b0 in range(0, blocks, BLOCK_T):
            b = b0 + tl.arange(0, BLOCK_T)
            mask = (b < blocks)[:, None] & (r < rows)[None, :]
            total += tl.load(shares + b.to(tl.int64)[:, None] * rows + r[None, :], mask=mask, other=0.0)
        s = tl.sum(total, 0) / divisor
        squares += s * s
        tl.store(s_ptr + tl.load(item + U) + r, s, mask=r < rows)
    tl.store(norms_ptr + tl.program_id(0), norm_of(squares, eps))
    tl.store(norms_ptr + tl.num_programs(0) + tl.program_id(0), divisor)


@triton.jit
def power_iteration_finish_kernel(items_table, u_ptr, norms_ptr, t_ptr, v_ptr, sigma_ptr, BLOCK: tl.constexpr):
    """u = s / |s|, v = t / |t|, sigma = u s (u_ptr holds s); where norms_ptr is None u and v stay, and sigma = t v."""
    item = items_table + tl.program_id(0).to(tl.int64) * FIELDS
    u, v, t = u_ptr + tl.load(item + U), v_ptr + tl.load(item + V), t_ptr + tl.load(item + V)
    rows, columns = tl.load(item + ROWS).to(tl.int32), tl.load(item + COLUMNS).to(tl.int32)
    sigma = tl.zeros([BLOCK], tl.float32)
    if norms_ptr is not None:
        divisor = tl.load(norms_ptr + tl.program_id(0))
        for i0 in range(0, rows, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            s = tl.load(u + i, mask=i < rows, other=0.0)
            sigma += s * (s / divisor)
            tl.store(u + i, s / divisor, mask=i < rows)
        divisor = tl.load(norms_ptr + tl.num_programs(0) + tl.program_id(0))
    for i0 in range(0, columns, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        here = tl.load(t + i, mask=i < columns, other=0.0)
        if norms_ptr is not None:
            tl.store(v + logical(item, i), here / divisor, mask=i < columns)
        else:
            sigma += here * tl.load(v + logical(item, i), mask=i < columns, other=0.0)
    tl.store(sigma_ptr + tl.program_id(0), tl.sum(sigma, 0))


@triton.jit
def fill(item, j, right, factor, u_ptr, WIDE: tl.constexpr, BLOCK_R: tl.constexpr):
    rows, columns = tl.load(item + ROWS).to(tl.int32), tl.load(item + COLUMNS).to(tl.int32)
    if WIDE:
        columns = tl.multiple_of(columns, 4)
    w_ptr, u = pointer_in(item, MATRIX, tl.float32, WIDE), u_ptr + tl.load(item + U)
    for r0 in range(0, rows, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        left = factor * tl.load(u + r, mask=r < rows, other=0.0)
        mask = (r < rows)[:, None] & (j < columns)[None, :]
        tl.store(w_ptr + r.to(tl.int64)[:, None] * columns + j[None, :], left[:, None] * right[None, :], mask=mask)


@triton.jit
def power_iteration_bwd_kernel(jobs_table, items_table, dsigma_ptr, u_ptr, v_ptr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """dW = dsigma u v^T"""
    item, _, j = find_columns(jobs_table, items_table, BLOCK_K)
    factor = tl.load(dsigma_ptr + tl.load(jobs_table + tl.program_id(0)))
    right = tl.load(v_ptr + tl.load(item + V) + logical(item, j), mask=j < tl.load(item + COLUMNS), other=0.0)
    if tl.load(item + ALIGNED) != 0:
        fill(item, j, right, factor, u_ptr, True, BLOCK_R)
    else:
        fill(item, j, right, factor, u_ptr, False, BLOCK_R)


def power_iteration_fwd(
    weights: Sequence[Tensor], u: Sequence[Tensor], v: Sequence[Tensor], iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    if not len(weights) == len(u) == len(v):
        raise RuntimeError(f"{len(weights)} weights, {len(u)} u, {len(v)} v: expected one u and one v for each weight")
    for i, (w, left, right) in enumerate(zip(weights, u, v, strict=True)):
        sizes = w.shape[0], w.numel() // max(w.shape[0], 1)
        if (left.numel(), right.numel()) != sizes or not left.device == right.device == w.device == weights[0].device:
            found = f"{left.numel()} values on {left.device}, {right.numel()} on {right.device}"
            raise RuntimeError(f"u[{i}], v[{i}] have {found}; expected {sizes[0]} and {sizes[1]} on {weights[0].device}")
    matrices = [_lists.dense_rows(w.to(torch.float32)) for w in weights]
    jobs, items, programs, shares_size = _tables(matrices)
    new_u, given_v = (torch.cat([t.reshape(-1).to(torch.float32) for t in ts]) for ts in (u, v))
    t = torch.empty_like(given_v)
    new_v = torch.empty_like(given_v) if iterations else given_v
    sigma, norms = t.new_empty(len(matrices)), t.new_empty(2, len(matrices)) if iterations else None
    shares = t.new_empty(shares_size) if iterations else None
    tile, each = dict(BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K, num_warps=16), (len(matrices),)
    for i in range(max(iterations, 1)):
        power_iteration_sweep_kernel[(programs,)](jobs, items, new_u, norms if i else None, t, shares, **tile)
        if iterations:
            power_iteration_join_kernel[each](
                *(items, t, shares, new_u, norms, eps), BLOCK_K=BLOCK_K, BLOCK_T=16, BLOCK_C=256, BLOCK=BLOCK, num_warps=8
            )
    power_iteration_finish_kernel[each](items, new_u, norms, t, new_v, sigma, BLOCK=BLOCK)
    return sigma, new_u, new_v


def power_iteration_bwd(dsigma: Tensor, u: Tensor, v: Tensor, layouts: Sequence[int]) -> list[Tensor]:
    grads, matrices = [], []
    for _ in range(dsigma.numel()):
        axes = layouts[0]
        size, stride = layouts[1 : 1 + axes], layouts[1 + axes : 1 + 2 * axes]
        layouts = layouts[1 + 2 * axes :]
        like = torch.empty_strided(size, stride, dtype=torch.float32, device="meta")
        grads.append(torch.empty_like(like, device=u.device))
        matrices.append(_lists.dense_rows(grads[-1]))
    if len(layouts) or u.numel() != sum(len(m) for m in matrices) or v.numel() != sum(m[0].numel() for m in matrices):
        raise RuntimeError(f"{dsigma.numel()} gradients, {u.numel()} of u, {v.numel()} of v: expected those of the layouts")
    if matrices:
        jobs, items, programs, _ = _tables(matrices)
        power_iteration_bwd_kernel[(programs,)](
            *(jobs, items, dsigma.contiguous(), u.contiguous(), v.contiguous()), BLOCK_R=BLOCK_R, BLOCK_K=BLOCK_K, num_warps=16
        )
    for grad, matrix in zip(grads, matrices, strict=True):
        if matrix is not grad:
            grad.copy_(matrix)
    return grads


def _tables(matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor, int, int]:
    """(jobs, items, number of programs, number of shares) of float32 matrices with dense rows."""
    rows, columns = [m.shape[0] for m in matrices], [m.numel() // m.shape[0] for m in matrices]
    counts = tuple(triton.cdiv(k, BLOCK_K) for k in columns)
    sizes = [count * r for count, r in zip(counts, rows, strict=True)]
    begins = zip(*(_lists.starts(n) for n in (counts, rows, columns, sizes)), strict=True)
    items = [
        (m.data_ptr(), r, k, *begin, *((k, 1) if m.is_contiguous() else (m.shape[1], k // m.shape[1])), _lists.aligned(k, m))
        for m, r, k, begin in zip(matrices, rows, columns, begins, strict=True)
    ]
    device = matrices[0].device
    tables = _lists.standing(_lists.jobs(counts), device), _lists.upload(_lists.numbers(items), device)
    return *tables, sum(counts), sum(sizes)
