"""Sums and statistics of tasks joined in float64, in the order of the tasks: kernels, then launchers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels._tile import load_rows, store_row


@triton.jit
def join_stats_kernel(parts_ptr, stats_ptr, M, C, CHUNK, TASKS, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """stats [2, C], mean and biased variance, from parts [tasks, 2, C] (Chan et al. 1983)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(0, TASKS, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        total += load_rows(parts_ptr, 2 * t, c, 2 * TASKS, C) * rows[:, None]
    mean = tl.sum(total, 0) / M
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(0, TASKS, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        d = load_rows(parts_ptr, 2 * t, c, 2 * TASKS, C) - mean[None, :]
        spread = load_rows(parts_ptr, 2 * t + 1, c, 2 * TASKS, C) + d * d * rows[:, None]
        total += tl.where((t < TASKS)[:, None], spread, 0.0)
    var = tl.sum(total, 0) / M
    store_row(stats_ptr, 0, c, C, mean)
    store_row(stats_ptr, 1, c, C, tl.where(var < 0, 0.0, var))  # NaN stays


@triton.jit
def join_sums_kernel(parts_ptr, sums_ptr, TASKS, WIDTH, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """sums [WIDTH] of parts [tasks, WIDTH]"""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_T, BLOCK_C], tl.float64)
    for t0 in range(0, TASKS, BLOCK_T):
        total += load_rows(parts_ptr, t0 + tl.arange(0, BLOCK_T), c, TASKS, WIDTH)
    store_row(sums_ptr, 0, c, WIDTH, tl.sum(total, 0))


def join_sums(parts: Tensor) -> Tensor:
    """The sum of parts [tasks, ...] over its tasks, which are one or more."""
    sums = parts.new_empty(parts.shape[1:])
    width = sums.numel()
    join_sums_kernel[(triton.cdiv(width, 32),)](parts, sums, len(parts), width, BLOCK_T=32, BLOCK_C=32)
    return sums


def join_stats(parts: Tensor, rows: int, chunk: int) -> Tensor:
    """Mean and biased variance [2, C] of `rows` values from parts [tasks, 2, C]: the mean of each task's `chunk` values (the
    last may have fewer) and their sum of squares about it."""
    tasks, _, channels = parts.shape
    stats = parts.new_empty(2, channels)
    join_stats_kernel[(triton.cdiv(channels, 32),)](parts, stats, rows, channels, chunk, tasks, BLOCK_T=32, BLOCK_C=32)
    return stats
