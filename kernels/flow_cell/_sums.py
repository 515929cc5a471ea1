"""How the programs of flow_cell's backward join the gradients of the weights, block by block of hidden channels: the last one
of a group of tasks adds up theirs, the last one of all groups what those have found. Groups are about as many as the tasks of
one: those who join read little one after the other, and what they read is still in the second-level cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import arrive

AT_ONCE = tl.constexpr(8)  # tasks that a program reads at a time
VALUES = tl.constexpr(1024)  # of each


@triton.jit
def joined(parts_ptr, first, last, n, block, Z, WIDTH, BLOCK_E: tl.constexpr):
    """(row, column, whether there are such, sums over parts first to last - 1, in order and in float64) of the values n of a
    block; those of the bias, which block 0 has, are the last."""
    weights = (10 * Z + 25) * BLOCK_E
    row = tl.minimum(n // BLOCK_E, 10 * Z + 25)
    e = tl.where(n < weights, block * BLOCK_E + n % BLOCK_E, n - weights)
    inside = n < weights + tl.where(block == 0, Z, 0)
    total = tl.zeros([AT_ONCE, VALUES], tl.float64)
    for t0 in range(first, last, AT_ONCE):
        t = t0 + tl.arange(0, AT_ONCE)
        at = (t.to(tl.int64) * (10 * Z + 26) * WIDTH)[:, None] + (row * WIDTH + e)[None, :]
        mask = (t < last)[:, None] & inside[None, :]
        total += tl.load(parts_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float64)
    return row, e, inside, tl.sum(total, 0).to(tl.float32)


@triton.jit
def join_weights(parts_ptr, tickets_ptr, gradients, strides, task, block, TASKS, GROUP, Z, E, WIDTH, BLOCK_E: tl.constexpr):
    """To be called by all programs, each with its part [10 Z + 26, WIDTH] stored, of which it has the columns of its block.
    gradients: of w_in, w_dw, w_out and bias; strides: of the first."""
    group, groups = task // GROUP, tl.cdiv(TASKS, GROUP)
    first, values = group * GROUP, (10 * Z + 25) * BLOCK_E + tl.where(block == 0, Z, 0)
    last = tl.minimum(first + GROUP, TASKS)
    tickets_ptr += block * (1 + groups)
    done = arrive(tickets_ptr + 1 + group, last - first)
    if done & (groups > 1):
        own = parts_ptr + (TASKS + group).to(tl.int64) * (10 * Z + 26) * WIDTH
        for n0 in range(0, values, VALUES):
            n = n0 + tl.arange(0, VALUES)
            row, e, inside, total = joined(parts_ptr, first, last, n, block, Z, WIDTH, BLOCK_E)
            tl.store(own + row * WIDTH + e, total, mask=inside)
        done = arrive(tickets_ptr, groups)
        first, last = TASKS, TASKS + groups
    if done:
        d_in_ptr, d_dw_ptr, d_out_ptr, d_bias_ptr = gradients
        for n0 in range(0, values, VALUES):
            n = n0 + tl.arange(0, VALUES)
            row, e, inside, total = joined(parts_ptr, first, last, n, block, Z, WIDTH, BLOCK_E)
            there, tap, tap_dw, c = inside & (e < E), row // Z, row - 9 * Z, row - 9 * Z - 25
            at = e * strides[0] + row % Z * strides[1] + tap // 3 * strides[2] + tap % 3 * strides[3]
            tl.store(d_in_ptr + at, total.to(d_in_ptr.dtype.element_ty), mask=there & (tap < 9))
            tl.store(d_dw_ptr + e * 25 + tap_dw, total.to(d_dw_ptr.dtype.element_ty), mask=there & (tap_dw >= 0) & (c < 0))
            tl.store(d_out_ptr + c * E + e, total.to(d_out_ptr.dtype.element_ty), mask=there & (c >= 0) & (c < Z))
            tl.store(d_bias_ptr + e, total.to(d_bias_ptr.dtype.element_ty), mask=inside & (c == Z))


def sums(z: Tensor, tasks: int, blocks: int, channels: int, width: int) -> tuple[Tensor, Tensor, int]:
    """(parts, tickets, tasks of a group) for a launch of `tasks` by `blocks`. The first `tasks` tickets are left to others."""
    group = math.isqrt(max(tasks - 1, 0)) + 1
    groups = triton.cdiv(tasks, group)
    parts = z.new_empty(tasks + groups, 10 * channels + 26, width, dtype=torch.float32)
    return parts, _triton.tickets(z.device, tasks + blocks * (1 + groups)), group
