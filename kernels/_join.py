"""Sums and statistics of tasks joined in float64, in the order of the tasks: kernels, then launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels._tile import load_rows, store_row

MANY = 128  # tasks, above which they are joined in 32 groups first: a program adds 32 tasks at a time, one after the other


@triton.jit
def join_stats_kernel(parts_ptr, out_ptr, M, C, CHUNK, TASKS, GROUP, VAR: tl.constexpr, BLOCK_T: tl.constexpr,
                      BLOCK_C: tl.constexpr):  # fmt: skip
    """out [groups, 2, C], mean and sum of squares about it (with VAR: biased variance) of GROUP tasks each, from those of parts
    [tasks, 2, C] (Chan et al. 1983)."""
    group, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = group * GROUP, tl.minimum(group * GROUP + GROUP, TASKS)
    count = tl.minimum(M, last.to(tl.int64) * CHUNK) - first.to(tl.int64) * CHUNK
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        total += load_rows(parts_ptr, 2 * t, c, 2 * last, C) * rows[:, None]
    mean = tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        d = load_rows(parts_ptr, 2 * t, c, 2 * last, C) - mean[None, :]
        spread = load_rows(parts_ptr, 2 * t + 1, c, 2 * last, C) + d * d * rows[:, None]
        total += tl.where((t < last)[:, None], spread, 0.0)
    spread = tl.sum(total, 0)
    if VAR:
        spread = spread / count
    store_row(out_ptr, 2 * group, c, C, mean)
    store_row(out_ptr, 2 * group + 1, c, C, tl.where(spread < 0, 0.0, spread))  # NaN stays


@triton.jit
def join_sums_kernel(parts_ptr, out_ptr, TASKS, WIDTH, GROUP, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """out [groups, WIDTH], the sums of GROUP tasks each, of parts [tasks, WIDTH]"""
    group, c = tl.program_id(1), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    last = tl.minimum(group * GROUP + GROUP, TASKS)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(group * GROUP, last, BLOCK_T):
        total += load_rows(parts_ptr, t0 + tl.arange(0, BLOCK_T), c, last, WIDTH)
    store_row(out_ptr, group, c, WIDTH, tl.sum(total, 0))


def join_sums(parts: Tensor, dtype: torch.dtype = torch.float32, out: Tensor | None = None) -> Tensor:
    """The sum of parts [tasks, ...] over its tasks, which are one or more; written to `out`, dense, where that is given."""

    def join(parts: Tensor, group: int, out: Tensor) -> Tensor:
        width = out[0].numel()
        grid = (triton.cdiv(width, 32), len(out))
        join_sums_kernel[grid](parts, out, len(parts), width, group, BLOCK_T=32, BLOCK_C=32)
        return out

    if len(parts) > MANY:
        group = triton.cdiv(len(parts), 32)
        parts = join(parts, group, torch.empty_like(parts[: triton.cdiv(len(parts), group)]))
    out = parts.new_empty(parts.shape[1:], dtype=dtype) if out is None else out
    return join(parts, len(parts), out[None])[0]


def join_stats(parts: Tensor, rows: int, chunk: int) -> Tensor:
    """Mean and biased variance [2, C] of `rows` values from parts [tasks, 2, C]: the mean of each task's `chunk` values (the
    last may have fewer) and their sum of squares about it."""

    def join(parts: Tensor, chunk: int, group: int, var: bool) -> Tensor:
        tasks, _, channels = parts.shape
        out = parts.new_empty(triton.cdiv(tasks, group), 2, channels)
        grid = (triton.cdiv(channels, 32), len(out))
        join_stats_kernel[grid](parts, out, rows, channels, chunk, tasks, group, VAR=var, BLOCK_T=32, BLOCK_C=32)
        return out

    if len(parts) > MANY:
        group = triton.cdiv(len(parts), 32)
        parts, chunk = join(parts, chunk, group, False), chunk * group
    return join(parts, chunk, len(parts), True)[0]
