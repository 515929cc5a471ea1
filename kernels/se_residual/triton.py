"""se_residual on a GPU: kernels, then launchers; those of the backward are in _backward.py. Images are rows of pixels [P, C]; a
program never leaves its image.

Passes over pixels are cut into tiles. What is known per image is computed behind the first pass by the last program of an image
(_device.py), which draws the last of its tickets (_join.py): forward the state [N, 3 C + H] (mean of x, gate, its slope, hidden
units), backward the shares [N, 4 C + H] (of the gradients of bias and scale, gradients of the mean, before the sigmoid, before
the relu). Sums are taken in a fixed order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import NO_JOIN, arrive, join, joined_stats
from nvae_fast.kernels._norm import Following
from nvae_fast.kernels._tile import SCALE, load_row, load_rows, offset_of, store_row, store_rows
from nvae_fast.kernels.bn_act import triton as bn_act
from nvae_fast.kernels.bn_act.ops import empty_image
from nvae_fast.kernels.bn_act.tables import following, store_stats
from nvae_fast.kernels.se_residual._backward import (  # noqa: F401
    se_residual_bwd,
    se_residual_bwd_kernel,
    se_residual_dgate_kernel,
    se_residual_dx,
    se_residual_dy_,
    se_residual_dy_kernel,
)
from nvae_fast.kernels.se_residual._device import factor_of, find_gate, gate_of, load_shift, store_parts
from nvae_fast.kernels.se_residual._sizes import before, block_of, sizes_of, sums


@triton.jit
def se_residual_gate_kernel(x_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, parts_ptr, tickets_ptr, inverse, P, C, H,
                            CHUNK, TASKS, BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
                            BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """Sums of x, and by the last program of an image its state; without x, `parts` are the sums."""
    task = tl.program_id(0)
    last = True
    if x_ptr is not None:
        store_parts(task, x_ptr, None, None, parts_ptr, P, C, CHUNK, TASKS, WIDE, BLOCK_M, BLOCK_C)
        last = arrive(tickets_ptr + task // TASKS, TASKS * tl.num_programs(1))
    if last:
        find_gate(task // TASKS, parts_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, inverse, C, H, TASKS, BIAS,
                  BLOCK_W, BLOCK_H)  # fmt: skip


@triton.jit
def se_residual_fwd_kernel(skip_ptr, x_ptr, bn_ptr, means_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, y_ptr, out_ptr, norm,
                           parts_ptr, tickets_ptr, residual_scale, M, P, C, H, CHUNK, TASKS, GROUP, BIAS: tl.constexpr,
                           WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                           BLOCK_W: tl.constexpr):  # fmt: skip
    """y = skip + (a x + b) of CHUNK pixels of an image, whose state is there or, with its means, found here; out [2, C], mean
    and biased variance of y as it is stored, or [5, C] (`store_stats`), where CHUNK divides an image."""
    task, block, tasks = tl.program_id(0), tl.program_id(1), tl.cdiv(P, CHUNK)
    image, c = task // tasks, block * BLOCK_C + tl.arange(0, BLOCK_C)
    m = offset_of(task % tasks, WIDE) * CHUNK + tl.arange(0, BLOCK_M)
    first = offset_of(image, WIDE) * P * C
    if means_ptr is not None:
        gate = residual_scale * gate_of(image, task % tasks == 0, block, means_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
                                        state_ptr, c, C, H, BIAS, BLOCK_W, BLOCK_H)  # fmt: skip
        a = gate
        if (bn_ptr is not None) and (not BIAS):
            a = gate * load_row(bn_ptr, SCALE, c, C)
    else:
        gate, a = factor_of(state_ptr, bn_ptr, image, residual_scale, c, C, H, BIAS, BLOCK_C)
    shift = tl.zeros([BLOCK_C], tl.float32)
    if bn_ptr is not None:
        shift = gate * load_shift(bn_ptr, c, C, BIAS)
    mean = tl.zeros([BLOCK_C], tl.float32)
    spread = tl.zeros([BLOCK_C], tl.float32)
    for p in range(0, CHUNK, BLOCK_M):
        y = load_rows(x_ptr + first, m, c, P, C) * a[None, :] + shift[None, :]
        y = (y + load_rows(skip_ptr + first, m, c, P, C)).to(y_ptr.dtype.element_ty).to(tl.float32)
        store_rows(y_ptr + first, m, c, P, C, y)
        m += BLOCK_M
        if parts_ptr is not None:  # those of a tile, joined with those before it (Chan et al. 1983)
            its, share = tl.sum(y, 0) / BLOCK_M, BLOCK_M / (p + BLOCK_M)
            y -= its[None, :]
            spread += tl.sum(y * y, 0) + (its - mean) * (its - mean) * (p * share)
            mean += (its - mean) * share
    if parts_ptr is not None:
        store_row(parts_ptr + task * 2 * C, 0, c, C, mean)
        store_row(parts_ptr + task * 2 * C, 1, c, C, spread)
        done, mean, var = joined_stats(parts_ptr, tickets_ptr, task, block, c, M, C, CHUNK, TASKS, GROUP)
        if done:
            store_stats(out_ptr, mean, var, block, c, C, norm)


def se_residual_fwd(skip: Tensor, x: Tensor, bn: Tensor | None, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None,
                    b2: Tensor | None, x_means: Tensor | None, residual_scale: float,
                    stats: bool, *norm: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, skip = _triton.image("x", x), _triton.image("skip", skip, x)
    images, channels, pixels, hidden = *sizes_of(x), 0 if w1 is None else w1.shape[0]
    (bn, bias), x_means = before(bn, channels), _triton.floats("x_means", x_means, images, channels)
    w1, b1 = _triton.floats("w1", w1, hidden, channels), _triton.floats("b1", b1, hidden)
    w2, b2 = _triton.floats("w2", w2, channels, hidden), _triton.floats("b2", b2, channels)
    y, state = empty_image(x, *x.shape), x.new_empty(images, 3 * channels + hidden if hidden else 0, dtype=torch.float32)
    if x.numel():
        block_c = block_of(x)
        block_m, across = 2048 // block_c, triton.cdiv(channels, block_c)
        whole = math.gcd(pixels, block_m)  # tiles that are all full
        stats_too = stats and whole * block_c >= 512
        block_m = whole if stats_too else block_m
        chunk = 0
        if hidden and x_means is not None:
            chunk = _chunk(images * across, triton.cdiv(pixels, block_m), (channels + block_c) * hidden)
        if hidden and not chunk:
            summed, inverse = x, 1.0 / pixels
            grid, parts, tickets, sizes = sums(x, 1, hidden, bias)
            if x_means is not None:
                grid, summed, parts, inverse = (images,), None, x_means, 1.0
                sizes["TASKS"] = 1
            se_residual_gate_kernel[grid](
                *(summed, bn, w1, b1, w2, b2, state, parts, tickets, inverse, pixels, channels, hidden), **sizes
            )
        gate = (x_means, w1, b1, w2, b2) if chunk else (None,) * 5
        chunk = (chunk or 1) * block_m
        tasks = images * triton.cdiv(pixels, chunk)
        joined = join(x, tasks, channels, across) if stats_too else NO_JOIN
        found = x.new_empty(Following(*norm).rows(stats), channels, dtype=torch.float32)
        behind = following(norm, channels, images * pixels) if stats_too else None
        block_h = _triton.power_of_2(hidden, 1 << 16)
        se_residual_fwd_kernel[(tasks, across)](
            *(skip, x, bn, *gate, state if hidden else None, y, found, behind, *joined[:2], residual_scale),
            *(images * pixels, pixels, channels, hidden, chunk, *joined[2:]),
            num_warps=8,  # with 4, the statistics do not fit into the registers
            BIAS=bias,
            WIDE=_triton.wide(x),
            BLOCK_M=block_m,
            BLOCK_C=block_c,
            BLOCK_H=block_h,
            BLOCK_W=_triton.power_of_2(channels, max(2048 // block_h, 16)),
        )
        if stats_too or not stats:
            return y, state, found
    return y, state, bn_act.bn_act_stats(y, *norm) if stats else x.new_empty(0, channels, dtype=torch.float32)


def _chunk(blocks: int, tiles: int, weights: int) -> int:
    """Tiles that a program has, of the `tiles` of one of the blocks (images times blocks of channels), where it finds the gate
    first and reads so many `weights`: about 1,000 programs at most, which together read 16 MB of them, from the second-level
    cache in about the time of a launch. 0: they would read more. A function of the sizes alone."""
    least = triton.cdiv(tiles, max(min(1024, (1 << 22) // max(weights, 1)) // blocks, 1))
    found = (n for n in range(least, min(4 * least, tiles) + 1) if tiles % n == 0)
    return next(found, 0) if blocks * weights <= 1 << 22 else 0
