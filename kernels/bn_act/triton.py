"""bn_act on a GPU: kernels, then launchers. x is rows of pixels [M, C]; a program has a tile [BLOCK_M, BLOCK_C] in registers.

Sums over rows are taken by tasks of CHUNK rows in float32 and joined in float64 by the last of them (kernels/_join.py).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import join, joined_stats, joined_sums
from nvae_fast.kernels._norm import Following
from nvae_fast.kernels._tile import (
    MEAN,
    SCALE,
    SHIFT,
    activate,
    affine_rows,
    differentiate,
    load_row,
    load_rows,
    offset_of,
    store_row,
    store_rows,
    store_taps,
)
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.bn_act.tables import (  # noqa: F401
    bn_act_coefficients,
    bn_act_gradients,
    following,
    share,
    store_gradients,
    store_stats,
    zero_stats,
)


@triton.jit
def bn_act_stats_kernel(x_ptr, out_ptr, norm, parts_ptr, tickets_ptr, TASKS, GROUP, M, C, CHUNK, WIDE: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """out [2, C], mean and biased variance, or [5, C] (`store_stats`), of parts [tasks, 2, C]: a task's mean and sum of
    squares about it, from sums about the mean of its first tile."""
    task, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = offset_of(task, WIDE) * CHUNK + tl.arange(0, BLOCK_M)
    rows = tl.minimum(M - offset_of(task, WIDE) * CHUNK, CHUNK).to(tl.float32)
    pivot = tl.sum(load_rows(x_ptr, m, c, M, C), 0) / tl.minimum(rows, BLOCK_M)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, CHUNK, BLOCK_M):
        d = tl.where((m < M)[:, None], load_rows(x_ptr, m, c, M, C) - pivot[None, :], 0.0)
        s1 += d
        s2 += d * d
        m += BLOCK_M
    total = tl.sum(s1, 0)
    store_row(parts_ptr + task * 2 * C, 0, c, C, pivot + total / rows)
    store_row(parts_ptr + task * 2 * C, 1, c, C, tl.sum(s2, 0) - total * total / rows)
    done, mean, var = joined_stats(parts_ptr, tickets_ptr, task, tl.program_id(1), c, M, C, CHUNK, TASKS, GROUP)
    if done:
        store_stats(out_ptr, mean, var, tl.program_id(1), c, C, norm)


@_triton.autotuned("C")
@triton.jit
def bn_act_fwd_kernel(x_ptr, bn_ptr, y_ptr, w_ptr, taps_ptr, M, C, ACT: tl.constexpr, WIDE: tl.constexpr, TAPS: tl.constexpr,
                      BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """And taps [TAPS^2, C] of the weight [C, TAPS^2] of a depthwise convolution behind it, by the first programs."""
    BLOCK_M: tl.constexpr = BLOCK // BLOCK_C
    m = offset_of(tl.program_id(0), WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale, shift = load_row(bn_ptr, SCALE, c, C), load_row(bn_ptr, SHIFT, c, C)
    u = load_rows(x_ptr, m, c, M, C) * scale[None, :] + shift[None, :]
    store_rows(y_ptr, m, c, M, C, activate(u, ACT))
    if w_ptr is not None:
        if tl.program_id(0) == 0:
            store_taps(w_ptr, taps_ptr, c, C, TAPS)


@triton.jit
def bn_act_sums_kernel(dy_ptr, x_ptr, bn_ptr, out_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, share, M, C, CHUNK,
                       ACT: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The table of gradients from parts [tasks, 2, C]: sum(du), sum(du (x - mean)). Rows past the end add nothing: their dy is
    0."""
    task, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = offset_of(task, WIDE) * CHUNK + tl.arange(0, BLOCK_M)
    mean = load_row(bn_ptr, MEAN, c, C)[None, :]
    scale, shift = load_row(bn_ptr, SCALE, c, C)[None, :], load_row(bn_ptr, SHIFT, c, C)[None, :]
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, CHUNK, BLOCK_M):
        x = load_rows(x_ptr, m, c, M, C)
        du = differentiate(load_rows(dy_ptr, m, c, M, C), x * scale + shift, ACT)
        du = tl.where((m < M)[:, None], du, 0.0)  # act' of a large shift may be infinite
        s1 += du
        s2 += du * (x - mean)
        m += BLOCK_M
    store_row(parts_ptr + task * 2 * C, 0, c, C, tl.sum(s1, 0))
    store_row(parts_ptr + task * 2 * C, 1, c, C, tl.sum(s2, 0))
    done, total, moment = joined_sums(parts_ptr, tickets_ptr, task, tl.program_id(1), c, C, TASKS, GROUP)
    if done:
        store_gradients(out_ptr, bn_ptr, total, moment, share, c, C)


@_triton.autotuned("C")
@triton.jit
def bn_act_bwd_kernel(dy_ptr, x_ptr, bn_ptr, c_ptr, also_ptr, also2_ptr, dx_ptr, M, C, ACT: tl.constexpr, WIDE: tl.constexpr,
                      BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    BLOCK_M: tl.constexpr = BLOCK // BLOCK_C
    m = offset_of(tl.program_id(0), WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x = load_rows(x_ptr, m, c, M, C)
    scale, shift = load_row(bn_ptr, SCALE, c, C), load_row(bn_ptr, SHIFT, c, C)
    du = differentiate(load_rows(dy_ptr, m, c, M, C), x * scale[None, :] + shift[None, :], ACT)
    c0, c1, c2 = load_row(c_ptr, 0, c, C), load_row(c_ptr, 1, c, C), load_row(c_ptr, 2, c, C)
    store_rows(dx_ptr, m, c, M, C, affine_rows(du, x, c0, c1, c2, also_ptr, also2_ptr, m, c, M, C))


@triton.jit
def bn_act_affine_kernel(du_ptr, x_ptr, c_ptr, also_ptr, also2_ptr, M, C, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_C: tl.constexpr):  # fmt: skip
    """In place, which is why it is not tuned: a tuner would run it more than once."""
    m = offset_of(tl.program_id(0), WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c0, c1, c2 = load_row(c_ptr, 0, c, C), load_row(c_ptr, 1, c, C), load_row(c_ptr, 2, c, C)
    du, x = load_rows(du_ptr, m, c, M, C), load_rows(x_ptr, m, c, M, C)
    store_rows(du_ptr, m, c, M, C, affine_rows(du, x, c0, c1, c2, also_ptr, also2_ptr, m, c, M, C))


def bn_act_stats(x: Tensor, *norm: Any) -> Tensor:
    x = _triton.image("x", x)
    rows, channels, grid, chunk, sizes = _reduction(x)
    if not x.numel():
        return zero_stats(x, channels, True, norm, 0)
    out, behind = x.new_empty(Following(*norm).rows(True), channels, dtype=torch.float32), following(norm, channels, rows)
    bn_act_stats_kernel[grid](
        x, out, behind, *join(x, grid[0], channels, grid[1]), rows, channels, chunk, WIDE=_triton.wide(x), **sizes
    )
    return out


def bn_act_fwd(x: Tensor, bn: Tensor, act: int) -> Tensor:
    return activated(x, bn, act, None)[0]


def activated(x: Tensor, bn: Tensor, act: int, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(act(scale x + shift), the weight [C, 1, k, k] of a depthwise convolution as taps [k^2, C])"""
    x = _triton.image("x", x)
    bn, y = _triton.floats("coefficients", bn, 5, x.shape[1]), empty_image(x, *x.shape)
    weight = None if weight is None else weight.contiguous()
    taps = None if weight is None else weight.new_empty(weight[0].numel(), len(weight))
    if x.numel():
        rows, channels, grid, block_c = _elementwise(x)
        sizes = dict(TAPS=1 if weight is None else weight.shape[-1], WIDE=_triton.wide(x), BLOCK_C=block_c)
        bn_act_fwd_kernel[grid](x, bn, y, weight, taps, rows, channels, ACT=act, **sizes)
    return y, taps


def bn_act_sums(dy: Tensor, x: Tensor, bn: Tensor, act: int, count: float = 0.0) -> Tensor:
    x, dy = _triton.image("x", x), _triton.image("dy", dy, x)
    rows, channels, grid, chunk, sizes = _reduction(x)
    bn = _triton.floats("coefficients", bn, 5, channels)
    if not x.numel():
        return bn.new_zeros(GRADIENTS, channels)
    out, parts = bn.new_empty(GRADIENTS, channels), join(x, grid[0], channels, grid[1])
    bn_act_sums_kernel[grid](
        dy, x, bn, out, *parts, share(count), rows, channels, chunk, ACT=act, WIDE=_triton.wide(x), **sizes
    )
    return out


def bn_act_bwd(dy: Tensor, x: Tensor, bn: Tensor, act: int, c: Tensor, also: Tensor | None = None,
               also2: Tensor | None = None) -> Tensor:  # fmt: skip
    x, dy = _triton.image("x", x), _triton.image("dy", dy, x)
    bn, c = _triton.floats("coefficients", bn, 5, x.shape[1]), _triton.floats("c", c, 3, x.shape[1])
    others = _others(also, also2, x)
    dx = empty_image(x, *x.shape)
    if x.numel():
        rows, channels, grid, block_c = _elementwise(x)
        bn_act_bwd_kernel[grid](dy, x, bn, c, *others, dx, rows, channels, ACT=act, WIDE=_triton.wide(x), BLOCK_C=block_c)
    return dx


def bn_act_affine_(du: Tensor, x: Tensor, c: Tensor, also: Tensor | None = None, also2: Tensor | None = None) -> None:
    x, dense = _triton.image("x", x), _triton.image("du", du, x)
    c = _triton.floats("c", c, 3, x.shape[1])
    others = _others(also, also2, x)
    if x.numel():
        rows, channels, grid, block_c = _elementwise(x)
        tile = {"BLOCK": 2048, "BLOCK_C": block_c}
        bn_act_affine_kernel[grid(tile)](
            dense, x, c, *others, rows, channels, WIDE=_triton.wide(x), BLOCK_M=2048 // block_c, BLOCK_C=block_c
        )
    if dense is not du:
        du.copy_(dense)


def _others(also: Tensor | None, also2: Tensor | None, x: Tensor) -> list[Tensor | None]:
    if also is None and also2 is not None:
        raise RuntimeError("bn_act: also2 without also; pass the only gradient there is as also")
    named = ("also", also), ("also2", also2)
    return [None if t is None else _triton.image(name, t, x) for name, t in named]


def _elementwise(x: Tensor):
    """(M, C, grid of tiles, BLOCK_C)"""
    channels = x.shape[1]
    rows, block_c = x.numel() // channels, _triton.power_of_2(channels, 64)

    def grid(tile):
        return triton.cdiv(rows, tile["BLOCK"] // block_c), triton.cdiv(channels, block_c)

    return rows, channels, grid, block_c


def _reduction(x: Tensor):
    """(M, C, grid of tasks, CHUNK, sizes of a tile): about 1,000 programs, where there are that many tiles."""
    channels = x.shape[1]
    rows, block_c = x.numel() // max(channels, 1), _triton.power_of_2(channels, 64)
    across = triton.cdiv(max(channels, 1), block_c)
    count, chunk = _triton.tasks(rows, 2048 // block_c, 1024 // across) if rows else (0, 0)
    return rows, channels, (count, across), chunk, {"BLOCK_M": 2048 // block_c, "BLOCK_C": block_c}
