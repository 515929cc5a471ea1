"""Sums and statistics of tasks joined in float64, in the order of the tasks.

A kernel joins what its own programs leave (`joined_sums`, `joined_stats`): each stores its part and draws a ticket, and who
draws the last one reads all parts. Many tasks are joined in groups first, each by the last of its group. Who is last changes
from run to run, the order of adding does not: the same bits. Tickets are 0 between launches (`_triton.tickets`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._tile import load_rows, store_row

MANY = 128  # tasks, above which they are joined in 32 groups first: a program adds 32 tasks at a time, one after the other
GROUPS = tl.constexpr(32)  # at most
BLOCK_T = tl.constexpr(16)  # tasks that a program reads at a time
VALUES = tl.constexpr(2048)  # of a tile that a program of `join_tile` adds at a time, of AHEAD tasks
AHEAD = tl.constexpr(4)
TILES = 8  # tasks whose tiles a program adds at least, one after the other, before they are joined in groups


@triton.jit
def arrive(ticket_ptr, COUNT):
    """Whether this program is the last of COUNT to call this, each with a part stored before: the last one may read all parts,
    past the first-level cache (`load_parts`), which knows nothing of what other multiprocessors stored."""
    tl.debug_barrier()  # one thread draws the ticket: all must have stored before it does
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == COUNT - 1
    if last:
        tl.store(ticket_ptr, 0)  # as the next launch expects it
    return last


@triton.jit
def load_parts(ptr, t, c, last, C, PITCH):
    """[BLOCK_T, BLOCK_C] of rows t, which are PITCH values apart, of a table [last, C or more]; 0 outside"""
    inside = (t < last)[:, None] & (c < C)[None, :]
    return tl.load(ptr + t[:, None] * PITCH + c[None, :], mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def add_parts(parts_ptr, first, last, c, C, PITCH):
    """Sum over tasks first to last - 1 of the values at c, in float64"""
    total = tl.zeros([BLOCK_T, c.shape[0]], tl.float64)
    for t0 in range(first, last, BLOCK_T):
        total += load_parts(parts_ptr, t0 + tl.arange(0, BLOCK_T), c, last, C, PITCH)
    return tl.sum(total, 0)


@triton.jit
def add_stats(parts_ptr, first, last, c, M, C, CHUNK):
    """Mean and sum of squares about it over tasks first to last - 1, of CHUNK values each (the last of M may have fewer), from
    those of parts [tasks, 2, C] (Chan et al. 1983)"""
    count = tl.minimum(M, last.to(tl.int64) * CHUNK) - first.to(tl.int64) * CHUNK
    total = tl.zeros([BLOCK_T, c.shape[0]], tl.float64)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        total += load_parts(parts_ptr, t, c, last, C, 2 * C) * rows[:, None]
    mean = tl.sum(total, 0) / count
    total = tl.zeros([BLOCK_T, c.shape[0]], tl.float64)
    for t0 in range(first, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        rows = tl.minimum(M - t.to(tl.int64) * CHUNK, CHUNK).to(tl.float64)
        d = load_parts(parts_ptr, t, c, last, C, 2 * C) - mean[None, :]
        spread = load_parts(parts_ptr + C, t, c, last, C, 2 * C) + d * d * rows[:, None]
        total += tl.where((t < last)[:, None], spread, 0.0)
    return mean, tl.sum(total, 0)


@triton.jit
def joined_sums(parts_ptr, tickets_ptr, task, block, c, C, TASKS, GROUP):
    """(whether this program holds the result, sums of both rows of parts [TASKS + groups, 2, C] over the tasks, at c). To be
    called by all programs, each having stored row `task` for the columns c, of which `block` is the number. The host's part is
    `Join`."""
    tickets = tickets_ptr + block * (1 + GROUPS)
    group, first = task // GROUP, task // GROUP * GROUP
    last = tl.minimum(first + GROUP, TASKS)
    s1 = tl.zeros([c.shape[0]], tl.float64)
    s2 = tl.zeros([c.shape[0]], tl.float64)
    done = arrive(tickets + 1 + group, last - first)
    if done:
        s1 = add_parts(parts_ptr, first, last, c, C, 2 * C)
        s2 = add_parts(parts_ptr + C, first, last, c, C, 2 * C)
        if GROUP < TASKS:
            store_row(parts_ptr, 2 * (TASKS + group), c, C, s1)
            store_row(parts_ptr, 2 * (TASKS + group) + 1, c, C, s2)
            groups = tl.cdiv(TASKS, GROUP)
            done = arrive(tickets, groups)
            if done:
                s1 = add_parts(parts_ptr, TASKS, TASKS + groups, c, C, 2 * C)
                s2 = add_parts(parts_ptr + C, TASKS, TASKS + groups, c, C, 2 * C)
    return done, s1, s2


@triton.jit
def joined_stats(parts_ptr, tickets_ptr, task, block, c, M, C, CHUNK, TASKS, GROUP):
    """(whether this program holds the result, mean, biased variance) of M values from the parts of tasks; as `joined_sums`"""
    tickets = tickets_ptr + block * (1 + GROUPS)
    group, first = task // GROUP, task // GROUP * GROUP
    last = tl.minimum(first + GROUP, TASKS)
    mean = tl.zeros([c.shape[0]], tl.float64)
    spread = tl.zeros([c.shape[0]], tl.float64)
    done = arrive(tickets + 1 + group, last - first)
    if done:
        mean, spread = add_stats(parts_ptr, first, last, c, M, C, CHUNK)
        if GROUP < TASKS:
            store_row(parts_ptr, 2 * (TASKS + group), c, C, mean)
            store_row(parts_ptr, 2 * (TASKS + group) + 1, c, C, spread)
            groups = tl.cdiv(TASKS, GROUP)
            done = arrive(tickets, groups)
            if done:
                above = parts_ptr + 2 * TASKS * C
                mean, spread = add_stats(above, groups * 0, groups, c, M, C, tl.cast(CHUNK, tl.int64) * GROUP)
    var = spread / M
    return done, mean, tl.where(var < 0, 0.0, var)  # NaN stays


@triton.jit
def add_tiles(parts_ptr, to_ptr, first, last, n0, k, N, K, PITCH, SIZE, ROWS: tl.constexpr):
    """to [N, K] = sum over tasks first to last - 1 of parts [., SIZE], in float64, of ROWS rows from n0 and the columns k; rows
    are PITCH values apart. Few rows at a time: the products before should not wait for registers that only this takes."""
    STEP: tl.constexpr = min(ROWS, VALUES // k.shape[0])
    for r in range(0, ROWS, STEP):
        n = n0 + r + tl.arange(0, STEP)
        at, inside = n[:, None] * PITCH + k[None, :], (n < N)[:, None] & (k < K)[None, :]
        total = tl.zeros([STEP, k.shape[0]], tl.float64)
        for t0 in range(first, last, AHEAD):
            for i in tl.static_range(AHEAD):
                part = parts_ptr + tl.cast(t0 + i, tl.int64) * SIZE + at
                total += tl.load(part, mask=inside & (t0 + i < last), other=0.0, cache_modifier=".cg").to(tl.float64)
        tl.store(to_ptr + at, total.to(to_ptr.dtype.element_ty), mask=inside)


@triton.jit
def join_tile(parts_ptr, tickets_ptr, out_ptr, task, tile, n0, k, N, K, PITCH, SIZE, TASKS, GROUP, ROWS: tl.constexpr):
    """Whether this program has written the sums of the tasks: out, a tile [ROWS, .] of rows that are PITCH values apart, of
    parts [TASKS + groups, SIZE]. To be called as `joined_sums`; `tile` is a number. The host's part is `join_tiles`."""
    tickets = tickets_ptr + tile * (1 + GROUPS)
    group, first = task // GROUP, task // GROUP * GROUP
    last = tl.minimum(first + GROUP, TASKS)
    done = arrive(tickets + 1 + group, last - first)
    if done:
        if GROUP < TASKS:
            row = parts_ptr + (TASKS + group).to(tl.int64) * SIZE
            add_tiles(parts_ptr, row, first, last, n0, k, N, K, PITCH, SIZE, ROWS)
            first, last = TASKS, TASKS + tl.cdiv(TASKS, GROUP)
            done = arrive(tickets, last - first)
    if done:
        add_tiles(parts_ptr, out_ptr, first, last, n0, k, N, K, PITCH, SIZE, ROWS)
    return done


@triton.jit
def join_mean(total, means_ptr, sums_ptr, ticket_ptr, image, row, first, tiles, c, C, P):
    """means [images, C] at c, of an image of P pixels from its `total` in one of its tiles: at once where that is all, else by
    the last of them to call this, from rows `first` and on of sums [., C], of which `row` is this tile's. In float32: they are
    few."""
    if tiles == 1:
        store_row(means_ptr, image, c, C, total / P)
    else:
        store_row(sums_ptr, row, c, C, total)
        if arrive(ticket_ptr, tiles):
            ROWS: tl.constexpr = 2048 // c.shape[0]
            sums = tl.zeros([ROWS, c.shape[0]], tl.float32)
            for t0 in range(first, first + tiles, ROWS):
                sums += load_parts(sums_ptr, t0 + tl.arange(0, ROWS), c, first + tiles, C, C)
            store_row(means_ptr, image, c, C, tl.sum(sums, 0) / P)


class Join(NamedTuple):
    """What the launcher of a kernel with `joined_sums`, `joined_stats` or `join_tile` passes on."""

    parts: Tensor | None  # [TASKS + groups, 2, C], or [TASKS + groups, values]
    tickets: Tensor | None
    TASKS: int
    GROUP: int


NO_JOIN = Join(None, None, 0, 0)


def join(like: Tensor, tasks: int, channels: int, blocks: int, images: int = 0) -> Join:
    """For the programs of `tasks` tasks in each of `blocks` blocks of columns, on the device of `like`; those of as many
    `images` may call `join_mean`, whose tickets are behind the others."""
    rows, group = _rows(tasks, BLOCK_T.value)
    parts = like.new_empty(rows, 2, channels, dtype=torch.float32)
    return Join(parts, _triton.tickets(like.device, blocks * (1 + GROUPS.value + images)), tasks, group)


def join_tiles(like: Tensor, tasks: int, size: int, tiles: int, before: Join, blocks: int) -> Join:
    """For `join_tile`: the programs of `tasks` tasks in each of the `tiles` tiles of `size` values, in a launch that joins
    `before`, of so many blocks, as well. One task has nothing to join."""
    if tasks == 1:
        return Join(None, None, 1, 1)
    rows, group = _rows(tasks, TILES)
    taken = 0 if before.tickets is None else blocks * (1 + GROUPS.value)
    tickets = _triton.tickets(like.device, taken + tiles * (1 + GROUPS.value))[taken:]
    return Join(like.new_empty(rows, size, dtype=torch.float32), tickets, tasks, group)


def _rows(tasks: int, least: int) -> tuple[int, int]:
    """(rows of parts, those of groups behind those of tasks; tasks of a group)"""
    group = max(triton.cdiv(tasks, GROUPS.value), least)
    return tasks + (triton.cdiv(tasks, group) if group < tasks else 0), group


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
