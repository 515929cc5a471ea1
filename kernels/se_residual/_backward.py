"""The backward of se_residual on a GPU: kernels, then launchers, as in triton.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import arrive
from nvae_fast.kernels._tile import (
    MEAN,
    SCALE,
    SHIFT,
    affine_rows,
    differentiate,
    load_row,
    load_rows,
    offset_of,
    store_row,
    store_rows,
)
from nvae_fast.kernels.bn_act.ops import empty_image
from nvae_fast.kernels.se_residual._device import add_images, factor_of, find_shares, store_parts
from nvae_fast.kernels.se_residual._sizes import before, block_of, sizes_of, sums


@triton.jit
def se_residual_dgate_kernel(dy_ptr, x_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr, shares_ptr, parts_ptr, tickets_ptr,
                             residual_scale, P, C, H, CHUNK, TASKS, BIAS: tl.constexpr, WIDE: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                             BLOCK_W: tl.constexpr):  # fmt: skip
    """Sums of dy and dy (x - mean), and with a gate, by the last program of an image, its shares."""
    task = tl.program_id(0)
    store_parts(task, dy_ptr, x_ptr, None if BIAS else bn_ptr, parts_ptr, P, C, CHUNK, TASKS, WIDE, BLOCK_M, BLOCK_C)
    if w1_ptr is not None:
        if arrive(tickets_ptr + task // TASKS, TASKS * tl.num_programs(1)):
            find_shares(task // TASKS, parts_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr, shares_ptr, residual_scale, C, H, TASKS,
                        BIAS, BLOCK_W, BLOCK_H)  # fmt: skip


@triton.jit
def se_residual_dy_kernel(dy_ptr, du_ptr, y_ptr, norm_ptr, c_ptr, also_ptr, also2_ptr, x_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr,
                          shares_ptr, parts_ptr, tickets_ptr, residual_scale, P, C, H, CHUNK, TASKS, ACT: tl.constexpr,
                          BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
                          BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):  # fmt: skip
    """As dgate, of a dy that is made here: c0 du' + c1 y + c2 and the others, du' = act'(scale y + shift) du with norm, else in
    the place of dy. The sums, in the order of dgate's, are of dy as it is stored."""
    task, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = offset_of(task // TASKS, WIDE) * P
    m, last = first + task % TASKS * CHUNK + tl.arange(0, BLOCK_M), first + P
    c0, c1, c2 = load_row(c_ptr, 0, c, C), load_row(c_ptr, 1, c, C), load_row(c_ptr, 2, c, C)
    mean = tl.zeros([BLOCK_C], tl.float32)
    if (bn_ptr is not None) and (not BIAS):
        mean = load_row(bn_ptr, MEAN, c, C)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, CHUNK, BLOCK_M):
        y = load_rows(y_ptr, m, c, last, C)
        if norm_ptr is None:
            du = load_rows(dy_ptr, m, c, last, C)
        else:
            scale, shift = load_row(norm_ptr, SCALE, c, C), load_row(norm_ptr, SHIFT, c, C)
            du = differentiate(load_rows(du_ptr, m, c, last, C), y * scale[None, :] + shift[None, :], ACT)
        dy = affine_rows(du, y, c0, c1, c2, also_ptr, also2_ptr, m, c, last, C).to(dy_ptr.dtype.element_ty)
        store_rows(dy_ptr, m, c, last, C, dy)
        dy = tl.where((m < last)[:, None], dy.to(tl.float32), 0.0)  # behind the image it is c2
        s1 += dy
        s2 += dy * (load_rows(x_ptr, m, c, last, C) - mean[None, :])
        m += BLOCK_M
    store_row(parts_ptr, 2 * task, c, C, tl.sum(s1, 0))
    store_row(parts_ptr, 2 * task + 1, c, C, tl.sum(s2, 0))
    if arrive(tickets_ptr + task // TASKS, TASKS * tl.num_programs(1)):
        find_shares(task // TASKS, parts_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr, shares_ptr, residual_scale, C, H, TASKS, BIAS,
                    BLOCK_W, BLOCK_H)  # fmt: skip


@triton.jit
def se_residual_bwd_kernel(dy_ptr, bn_ptr, state_ptr, shares_ptr, dx_ptr, dbn_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, inverse,
                           residual_scale, share, P, C, H, ROWS, ADDING, BIAS: tl.constexpr, WIDE: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
                           BLOCK_W: tl.constexpr):  # fmt: skip
    """dx = a dy + b of a tile, behind ADDING programs that take the sums over images meanwhile."""
    program = tl.program_id(0)
    if program < ADDING:
        add_images(program, shares_ptr, state_ptr, bn_ptr, dbn_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, residual_scale, share,
                   ROWS, C, H, BIAS, BLOCK_N, BLOCK_W, BLOCK_H)  # fmt: skip
    else:
        tiles, across = tl.cdiv(P, BLOCK_M), tl.cdiv(C, BLOCK_C)
        tile, c = (program - ADDING) // across, (program - ADDING) % across * BLOCK_C + tl.arange(0, BLOCK_C)
        m = offset_of(tile % tiles, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
        image = tile // tiles
        first = offset_of(image, WIDE) * P * C
        gate, a = factor_of(state_ptr, bn_ptr, image, residual_scale, c, C, H, BIAS, BLOCK_C)
        dx = load_rows(dy_ptr + first, m, c, P, C) * a[None, :]
        if state_ptr is not None:
            b = load_row(shares_ptr + image * (4 * C + H), 2, c, C) * inverse
            if (bn_ptr is not None) and (not BIAS):
                b *= load_row(bn_ptr, SCALE, c, C)
            dx += b[None, :]
        store_rows(dx_ptr + first, m, c, P, C, dx)


def se_residual_bwd(dy: Tensor, x: Tensor, bn: Tensor | None, w1: Tensor | None, w2: Tensor | None, state: Tensor,
                    residual_scale: float) -> list[Tensor]:  # fmt: skip
    x, dy = _triton.image("x", x), _triton.image("dy", dy, x)
    gate = _gate(x, bn, w1, w2, state)
    bn, bias, hidden, w1, w2, state = gate
    if not x.numel() or (bn is None and not hidden):
        return _second(dy, gate, None, 0, residual_scale)
    summed = x if hidden or not bias else None  # a bias alone wants sum(dy) alone
    grid, parts, tickets, sizes = sums(x, 1 if summed is None else 2, hidden, bias)
    _, channels, pixels = sizes_of(x)
    shares = _shares(x, gate) if hidden else parts
    se_residual_dgate_kernel[grid](
        *(dy, summed, bn, w1, w2, state, shares, parts, tickets, residual_scale, pixels, channels, hidden), **sizes
    )
    return _second(dy, gate, shares, len(x) if hidden else grid[0], residual_scale)


def se_residual_dy_(dy: Tensor, du: Tensor | None, y: Tensor, norm: Tensor | None, act: int, c: Tensor, also: Tensor | None,
                    also2: Tensor | None, x: Tensor, bn: Tensor | None, w1: Tensor, w2: Tensor, state: Tensor,
                    residual_scale: float) -> Tensor:  # fmt: skip
    if (du is None) != (norm is None):
        raise RuntimeError("se_residual_dy_: expected both du and norm, or neither where dy holds du")
    x, dense = _triton.image("x", x), _triton.image("dy", dy, x)
    images = {"du": du, "y": y, "also": also, "also2": also2}
    du, y, also, also2 = (None if t is None else _triton.image(name, t, x) for name, t in images.items())
    _, channels, pixels = sizes_of(x)
    norm, c = _triton.floats("norm", norm, 5, channels), _triton.floats("c", c, 3, channels)
    gate = _gate(x, bn, w1, w2, state)
    bn, bias, hidden, w1, w2, state = gate
    shares = _shares(x, gate)
    if x.numel():
        grid, parts, tickets, sizes = sums(x, 2, hidden, bias)
        se_residual_dy_kernel[grid](
            *(dense, du, y, norm, c, also, also2, x, bn, w1, w2, state, shares, parts, tickets, residual_scale),
            *(pixels, channels, hidden),
            ACT=act,
            **sizes,
        )
    if dense is not dy:
        dy.copy_(dense)
    return shares


def se_residual_dx(dy: Tensor, bn: Tensor | None, w1: Tensor, w2: Tensor, state: Tensor, shares: Tensor,
                   residual_scale: float) -> list[Tensor]:  # fmt: skip
    dy = _triton.image("dy", dy)
    gate = _gate(dy, bn, w1, w2, state)
    shares = _triton.floats("shares", shares, len(dy), 4 * dy.shape[1] + gate.hidden)
    return _second(dy, gate, shares, len(dy), residual_scale)


class _Gate(NamedTuple):
    """What is known of the op but for its images; hidden units 0 without a gate."""

    bn: Tensor | None
    bias: bool
    hidden: int
    w1: Tensor | None
    w2: Tensor | None
    state: Tensor


def _gate(x: Tensor, bn: Tensor | None, w1: Tensor | None, w2: Tensor | None, state: Tensor) -> _Gate:
    (images, channels, _), hidden = sizes_of(x), 0 if w1 is None else w1.shape[0]
    w1, w2 = _triton.floats("w1", w1, hidden, channels), _triton.floats("w2", w2, channels, hidden)
    state = _triton.floats("state", state, images, 3 * channels + hidden if hidden else 0)
    return _Gate(*before(bn, channels), hidden, w1, w2, state)


def _shares(x: Tensor, gate: _Gate) -> Tensor:
    return gate.state.new_empty(x.shape[0], 4 * x.shape[1] + gate.hidden)


def _second(dy: Tensor, gate: _Gate, shares: Tensor | None, rows: int, residual_scale: float) -> list[Tensor]:
    """The second pass, and the gradients of parameters from `rows` shares or parts."""
    (images, channels, pixels), (bn, bias, hidden, _, _, state) = sizes_of(dy), gate
    dx = empty_image(dy, *dy.shape)
    dbn = None if bn is None else torch.empty_like(bn)
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,)) if hidden else ()
    dgate = [state.new_empty(shape) for shape in shapes]
    found = [t for t in (dbn, *dgate) if t is not None]
    if not dy.numel():
        return [dx, *(t.zero_() for t in found)]
    block_c, block_h = block_of(dy), _triton.power_of_2(hidden, 64)
    adding = triton.cdiv(channels, 16) * triton.cdiv(max(hidden, 1), block_h) if found else 0
    tiles = images * triton.cdiv(pixels, 2048 // block_c) * triton.cdiv(channels, block_c)
    se_residual_bwd_kernel[(adding + tiles,)](
        *(dy, bn, state if hidden else None, shares, dx, dbn, *(dgate or [None] * 4)),
        *(1.0 / pixels, residual_scale, 1.0 / (images * pixels), pixels, channels, hidden, rows, adding),
        BIAS=bias,
        WIDE=_triton.wide(dy),
        BLOCK_M=2048 // block_c,
        BLOCK_C=block_c,
        BLOCK_N=max(128 // block_h, 1),
        BLOCK_W=16,
        BLOCK_H=block_h,
    )
    return [dx, *found]
