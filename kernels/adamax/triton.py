"""adamax on a GPU: kernels, then launchers, for flat arenas, whose parameters begin at multiples of 16 elements."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels.adamax.reference import ROW

WIDTH = tl.constexpr(ROW)
STAY = tl.constexpr(float("inf"))  # the step size of a parameter that is left alone
SIDE = tl.constexpr(2)  # numbers of a parameter in the table of gradients
BLOCK = 1024
TASKS = 1024  # sums of squares, which one program joins


@triton.jit
def load_gradients(grads_table, p, i, inside):
    """Those of elements i [R, 16] of the arena, which belong to parameters p [R]; 0 where there is none."""
    address = tl.multiple_of(tl.load(grads_table + p * SIDE).to(tl.pointer_type(tl.float32)), [16])
    end = tl.multiple_of(tl.load(grads_table + p * SIDE + 1), [4])
    return tl.load(address[:, None] + i, mask=inside & (i < end[:, None]), other=0.0)


@triton.jit
def adamax_squares_kernel(grads_table, rows_ptr, squares_ptr, ROWS, SPAN, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """squares [tasks], float64, of SPAN rows each. Within a tile the largest is factored out: no square of a finite number
    overflows."""
    r = offset_of(tl.program_id(0), WIDE) * SPAN + tl.arange(0, BLOCK // WIDTH)
    total = 0.0
    total = total.to(tl.float64)
    for _ in range(0, SPAN, BLOCK // WIDTH):
        p = tl.load(rows_ptr + r, mask=r < ROWS, other=0)
        g = load_gradients(grads_table, p, r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], (r < ROWS)[:, None])
        g = tl.reshape(g, [BLOCK])
        largest = tl.max(tl.abs(g), 0)
        scale = tl.where(largest > 0, largest, 1.0)
        share = g / scale  # NaN where g is, or where g and the largest are infinite
        total += tl.sum(share * share, 0).to(tl.float64) * scale.to(tl.float64) * scale.to(tl.float64)
        r += BLOCK // WIDTH
    tl.store(squares_ptr + tl.program_id(0), total)


@triton.jit
def adamax_join_kernel(squares_ptr, total_ptr, COUNT, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(total_ptr, tl.sum(tl.load(squares_ptr + i, mask=i < COUNT, other=0.0), 0))


@triton.jit
def adamax_sizes_kernel(steps_ptr, active_ptr, lr_ptr, take_ptr, sizes_ptr, P, LOG_BETA1: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the steps of P parameters; sizes [P]: -lr / (1 - beta1^t), in float64 as in Python."""
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    move = tl.load(active_ptr + p, mask=p < P, other=0) != 0
    if take_ptr is not None:
        move = move & (tl.load(take_ptr) != 0)
    t = tl.load(steps_ptr + p, mask=p < P, other=0.0) + tl.where(move, 1.0, 0.0)
    tl.store(steps_ptr + p, t, mask=p < P)
    log_beta1 = tl.full([BLOCK], LOG_BETA1, tl.float64)
    size = -tl.load(lr_ptr) / (1.0 - tl.exp(log_beta1 * t.to(tl.float64)))
    tl.store(sizes_ptr + p, tl.where(move, size.to(tl.float32), STAY), mask=p < P)


@triton.jit
def adamax_step_kernel(param_ptr, grads_table, avg_ptr, inf_ptr, ema_ptr, rows_ptr, sizes_ptr, factor_ptr, sign, weight, beta2,
                       eps, decay, ema_weight, ROWS, DECAY: tl.constexpr, NEAR: tl.constexpr, WIDE: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    """A tile is rows of 16 elements, each of one parameter, whose number rows [ROWS] holds."""
    r = offset_of(tl.program_id(0), WIDE) * (BLOCK // WIDTH) + tl.arange(0, BLOCK // WIDTH)
    p = tl.load(rows_ptr + r, mask=r < ROWS, other=0)
    size = tl.load(sizes_ptr + p)
    move = ((r < ROWS) & (size != STAY))[:, None]
    size = size[:, None]
    i = r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    factor = sign
    if factor_ptr is not None:
        factor = sign * tl.load(factor_ptr)
    x = tl.load(param_ptr + i, mask=move, other=0.0)
    g = factor * load_gradients(grads_table, p, i, move)
    if DECAY:  # else an infinite parameter would touch its gradient
        g += decay * x
    m = tl.load(avg_ptr + i, mask=move, other=0.0)
    # lerp(m, g, w) is m + w (g - m) for w < 1/2, else g + (w - 1) (g - m).
    if NEAR:
        m = m + weight * (g - m)
    else:
        m = g + (weight - 1.0) * (g - m)
    old, now = beta2 * tl.load(inf_ptr + i, mask=move, other=1.0), tl.abs(g) + eps
    u = tl.where((old > now) | (old != old), old, now)  # NaN in either stays
    y = x + size * m / u
    tl.store(avg_ptr + i, m, mask=move)
    tl.store(inf_ptr + i, u, mask=move)
    tl.store(param_ptr + i, y, mask=move)
    if ema_ptr is not None:
        ema = tl.load(ema_ptr + i, mask=move, other=0.0)
        tl.store(ema_ptr + i, ema + ema_weight * (y - ema), mask=move)


def adamax_flat_squares(param: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """reference.flat_squares"""
    tasks, chunk = _triton.tasks(len(rows), BLOCK // ROW, TASKS)
    sums, out = param.new_empty(tasks, dtype=torch.float64), param.new_empty((), dtype=torch.float64)
    adamax_squares_kernel[(tasks,)](table, rows, sums, len(rows), chunk, WIDE=_triton.wide(param), BLOCK=BLOCK)
    adamax_join_kernel[(1,)](sums, out, tasks, BLOCK=TASKS)
    return out


def adamax_flat_step_(
    param: Tensor,
    table: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    ema: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    active: Tensor,
    lr: Tensor,
    factor: Tensor | None,
    take: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_decay: float,
) -> None:
    """reference.flat_step_"""
    sizes = torch.empty_like(steps)
    log_beta1 = math.log(beta1) if beta1 else -1e9
    grid = (triton.cdiv(len(steps), 256),)
    adamax_sizes_kernel[grid](steps, active, lr, take, sizes, len(steps), LOG_BETA1=log_beta1, BLOCK=256)
    adamax_step_kernel[(triton.cdiv(param.numel(), BLOCK),)](
        param, table, exp_avg, exp_inf, ema, rows, sizes, factor, -1.0 if maximize else 1.0, 1 - beta1, beta2, eps,
        weight_decay, 1 - ema_decay, len(rows), DECAY=weight_decay != 0, NEAR=1 - beta1 < 0.5,
        WIDE=_triton.wide(param), BLOCK=BLOCK,
    )  # fmt: skip
