"""se_residual on a GPU: kernels, then launchers. Images are rows of pixels [P, C]; a program never leaves its image.

Passes over pixels are cut into tiles. What is known per image and channel [N, C] is computed between them by one program an
image, as the table ab [N, 2, C] that the pass behind it applies. Sums are taken in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import join_sums
from nvae_fast.kernels._tile import MEAN, SCALE, SHIFT, load_pitched, load_row, load_rows, offset_of, store_row, store_rows
from nvae_fast.kernels.bn_act import triton as bn_act
from nvae_fast.kernels.bn_act.ops import empty_image


@triton.jit
def add_parts(parts_ptr, image, TASKS, KINDS: tl.constexpr, KIND: tl.constexpr, c, C):
    """Sum over the tasks of an image, of one kind of parts [N, tasks, KINDS, C]."""
    total = load_row(parts_ptr, image * TASKS * KINDS + KIND, c, C)
    for task in range(1, TASKS):
        total += load_row(parts_ptr, (image * TASKS + task) * KINDS + KIND, c, C)
    return total


@triton.jit
def se_residual_sums_kernel(
    dy_ptr, x_ptr, bn_ptr, parts_ptr, P, C, CHUNK, TASKS, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """parts [N, tasks, 2, C]: sum(dy), sum(dy (x - mean)) over CHUNK pixels, mean 0 without bn; or sum(dy) [N, tasks, C]"""
    task, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = offset_of(task % TASKS, WIDE) * CHUNK + tl.arange(0, BLOCK_M)
    first = offset_of(task // TASKS, WIDE) * P * C
    mean = tl.zeros([BLOCK_C], tl.float32)
    if bn_ptr is not None:
        mean = load_row(bn_ptr, MEAN, c, C)
    s1 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for _ in range(0, CHUNK, BLOCK_M):
        dy = load_rows(dy_ptr + first, m, c, P, C)
        s1 += dy
        if x_ptr is not None:
            s2 += dy * (load_rows(x_ptr + first, m, c, P, C) - mean[None, :])
        m += BLOCK_M
    if x_ptr is not None:
        store_row(parts_ptr, 2 * task, c, C, tl.sum(s1, 0))
        store_row(parts_ptr, 2 * task + 1, c, C, tl.sum(s2, 0))
    else:
        store_row(parts_ptr, task, c, C, tl.sum(s1, 0))


@triton.jit
def se_residual_fwd_kernel(parts_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, ab_ptr, inverse, residual_scale, C, H,
                           TASKS, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The gate of an image, from the sums of x times `inverse`: a = s gate scale, b = s gate shift, and the state (mean of x,
    gate, hidden units) for the backward. Without w1 the gate is 1 and there is no state."""
    image = tl.program_id(0)
    state = state_ptr + image * (2 * C + H)
    h = tl.arange(0, BLOCK_H)
    hidden = tl.zeros([BLOCK_H], tl.float32)
    if w1_ptr is not None:
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            mean = add_parts(parts_ptr, image, TASKS, 1, 0, c, C) * inverse
            store_row(state, 0, c, C, mean)
            if bn_ptr is not None:
                mean = mean * load_row(bn_ptr, SCALE, c, C) + load_row(bn_ptr, SHIFT, c, C)
            hidden += tl.sum(load_rows(w1_ptr, h, c, H, C) * mean[None, :], 1)
        hidden += load_row(b1_ptr, 0, h, H)
        hidden = tl.where((hidden <= 0) | (h >= H), 0.0, hidden)  # NaN stays
        store_row(state + 2 * C, 0, h, H, hidden)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        a = tl.zeros([BLOCK_C], tl.float32) + residual_scale
        if w1_ptr is not None:
            gate = tl.sum(load_rows(w2_ptr, c, h, C, H) * hidden[None, :], 1)
            gate = tl.sigmoid(gate + load_row(b2_ptr, 0, c, C))
            store_row(state, 1, c, C, gate)
            a *= gate
        b = tl.zeros([BLOCK_C], tl.float32)
        if bn_ptr is not None:
            b = a * load_row(bn_ptr, SHIFT, c, C)
            a *= load_row(bn_ptr, SCALE, c, C)
        store_row(ab_ptr, 2 * image, c, C, a)
        store_row(ab_ptr, 2 * image + 1, c, C, b)


@_triton.autotuned("C", "P")
@triton.jit
def se_residual_apply_kernel(
    skip_ptr, x_ptr, ab_ptr, y_ptr, P, C, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr
):
    """y = skip + (a x + b); the backward's dx = a dy + b is the same without skip."""
    BLOCK_M: tl.constexpr = BLOCK // BLOCK_C
    tiles = tl.cdiv(P, BLOCK_M)
    image, c = tl.program_id(0) // tiles, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = offset_of(tl.program_id(0) % tiles, WIDE) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = offset_of(image, WIDE) * P * C
    a, b = load_row(ab_ptr, 2 * image, c, C), load_row(ab_ptr, 2 * image + 1, c, C)
    y = load_rows(x_ptr + first, m, c, P, C) * a[None, :] + b[None, :]
    if skip_ptr is not None:
        y += load_rows(skip_ptr + first, m, c, P, C)
    store_rows(y_ptr + first, m, c, P, C, y)


@triton.jit
def se_residual_bwd_kernel(parts_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr, dgate_ptr, dhidden_ptr, dbn_ptr, ab_ptr, inverse,
                           residual_scale, C, H, TASKS, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The gate's backward of an image, from sum(dy) and sum(dy (x - mean)): gradients before the sigmoid [N, C] and the relu
    [N, H], shares of those of scale and bias [N, 2, C], and the table of dx. Without w1 the gate is 1, without bn the scale."""
    image = tl.program_id(0)
    state = state_ptr + image * (2 * C + H)
    h = tl.arange(0, BLOCK_H)
    dhidden = tl.zeros([BLOCK_H], tl.float32)
    if w1_ptr is not None:
        for c0 in range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            da = add_parts(parts_ptr, image, TASKS, 2, 1, c, C)
            if bn_ptr is not None:
                scale = load_row(bn_ptr, SCALE, c, C)
                bias = load_row(bn_ptr, SHIFT, c, C) + load_row(bn_ptr, MEAN, c, C) * scale
                da = da * scale + add_parts(parts_ptr, image, TASKS, 2, 0, c, C) * bias
            gate = load_row(state, 1, c, C)
            da *= residual_scale * gate * (1.0 - gate)
            store_row(dgate_ptr, image, c, C, da)
            dhidden += tl.sum(load_rows(w2_ptr, c, h, C, H) * da[:, None], 0)
        dhidden = tl.where((load_row(state + 2 * C, 0, h, H) <= 0) | (h >= H), 0.0, dhidden)
        store_row(dhidden_ptr, image, h, H, dhidden)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        a = tl.zeros([BLOCK_C], tl.float32) + residual_scale
        dmean = tl.zeros([BLOCK_C], tl.float32)
        if w1_ptr is not None:
            a *= load_row(state, 1, c, C)
            dmean = tl.sum(load_rows(w1_ptr, h, c, H, C) * dhidden[:, None], 0)
        b = dmean * inverse
        if bn_ptr is not None:
            dscale = a * add_parts(parts_ptr, image, TASKS, 2, 1, c, C)
            if w1_ptr is not None:
                dscale += dmean * (load_row(state, 0, c, C) - load_row(bn_ptr, MEAN, c, C))
            store_row(dbn_ptr, 2 * image, c, C, dscale)
            store_row(dbn_ptr, 2 * image + 1, c, C, a * add_parts(parts_ptr, image, TASKS, 2, 0, c, C) + dmean)
            scale = load_row(bn_ptr, SCALE, c, C)
            a *= scale
            b *= scale
        store_row(ab_ptr, 2 * image, c, C, a)
        store_row(ab_ptr, 2 * image + 1, c, C, b)


@triton.jit
def se_residual_weights_kernel(dgate_ptr, dhidden_ptr, state_ptr, bn_ptr, dw1_ptr, dw2_ptr, N, C, H, BLOCK_N: tl.constexpr,
                               BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """dw1 [H, C] = dhidden^T pooled and dw2 [C, H] = dgate^T hidden, summed over images in float64."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dw1 = tl.zeros([BLOCK_H, BLOCK_C], tl.float64)
    dw2 = tl.zeros([BLOCK_C, BLOCK_H], tl.float64)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        pooled = load_pitched(state_ptr, n, c, N, C, 2 * C + H)
        hidden = load_pitched(state_ptr + 2 * C, n, h, N, H, 2 * C + H)
        if bn_ptr is not None:
            pooled = pooled * load_row(bn_ptr, SCALE, c, C)[None, :] + load_row(bn_ptr, SHIFT, c, C)[None, :]
        dgate, dhidden = load_rows(dgate_ptr, n, c, N, C), load_rows(dhidden_ptr, n, h, N, H)
        dw1 += tl.sum(dhidden[:, :, None] * pooled[:, None, :], 0)
        dw2 += tl.sum(dgate[:, :, None] * hidden[:, None, :], 0)
    store_rows(dw1_ptr, h, c, H, C, dw1)
    store_rows(dw2_ptr, c, h, C, H, dw2)


def se_residual_fwd(skip: Tensor, x: Tensor, bn: Tensor | None, w1: Tensor | None, b1: Tensor | None, w2: Tensor | None,
                    b2: Tensor | None, x_means: Tensor | None, residual_scale: float,
                    stats: bool) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, skip = _triton.image("x", x), _triton.image("skip", skip, x)
    images, channels, pixels, hidden = *_sizes(x), 0 if w1 is None else w1.shape[0]
    bn, x_means = _triton.floats("coefficients", bn, 5, channels), _triton.floats("x_means", x_means, images, channels)
    w1, b1 = _triton.floats("w1", w1, hidden, channels), _triton.floats("b1", b1, hidden)
    w2, b2 = _triton.floats("w2", w2, channels, hidden), _triton.floats("b2", b2, channels)
    y, state = empty_image(x, *x.shape), x.new_empty(images, 2 * channels + hidden if hidden else 0, dtype=torch.float32)
    if x.numel():
        parts, count, inverse = x_means, 1, 1.0
        if hidden and x_means is None:
            parts, count = _sums(x, None, None)
            inverse = 1.0 / pixels
        ab = x.new_empty(images, 2, channels, dtype=torch.float32)
        se_residual_fwd_kernel[(images,)](
            *(parts, bn, w1, b1, w2, b2, state, ab, inverse, residual_scale, channels, hidden, count),
            **_gate_tile(channels, hidden),
        )
        _apply(skip, x, ab, y)
    return y, state, bn_act.bn_act_stats(y) if stats else x.new_empty(0, channels, dtype=torch.float32)


def se_residual_bwd(dy: Tensor, x: Tensor, bn: Tensor | None, w1: Tensor | None, w2: Tensor | None, state: Tensor,
                    residual_scale: float) -> list[Tensor]:  # fmt: skip
    x, dy = _triton.image("x", x), _triton.image("dy", dy, x)
    images, channels, pixels, hidden = *_sizes(x), 0 if w1 is None else w1.shape[0]
    bn = _triton.floats("coefficients", bn, 5, channels)
    w1, w2 = _triton.floats("w1", w1, hidden, channels), _triton.floats("w2", w2, channels, hidden)
    state = _triton.floats("state", state, images, 2 * channels + hidden if hidden else 0)
    dx = empty_image(x, *x.shape)
    ab, dbn, dgate = (state.new_empty(images, *shape, channels) for shape in ((2,), (2,), ()))
    dhidden = state.new_empty(images, hidden)
    if x.numel():
        parts, count = (None, 1) if bn is None and w1 is None else _sums(dy, x, bn)
        se_residual_bwd_kernel[(images,)](
            *(parts, bn, w1, w2, state, dgate, dhidden, dbn, ab, 1.0 / pixels, residual_scale, channels, hidden, count),
            **_gate_tile(channels, hidden),
        )
        _apply(None, dy, ab, dx)
    found = [dx]
    if bn is not None:
        found.append(torch.zeros_like(bn))
        if x.numel():
            join_sums(dbn, out=found[-1][3:])
    if w1 is not None and w2 is not None:
        dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
        if not x.numel():
            dw1.zero_(), dw2.zero_()
        else:
            block_h = _triton.power_of_2(hidden, 64)
            grid = (triton.cdiv(channels, 16), triton.cdiv(hidden, block_h))
            se_residual_weights_kernel[grid](
                *(dgate, dhidden, state, bn, dw1, dw2, images, channels, hidden),
                BLOCK_N=max(128 // block_h, 1),
                BLOCK_C=16,
                BLOCK_H=block_h,
            )
        dgate, dhidden = (join_sums(t) if x.numel() else t.sum(0) for t in (dgate, dhidden))
        found += [dw1, dhidden, dw2, dgate]
    return found


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _block_c(x: Tensor) -> int:
    return _triton.power_of_2(x.shape[1], 64 if x.shape[2] * x.shape[3] > 16 else 128)


def _sums(dy: Tensor, x: Tensor | None, bn: Tensor | None) -> tuple[Tensor, int]:
    """(parts of `se_residual_sums_kernel`, tasks of an image): about 1,000 programs, where there are that many tiles."""
    images, channels, pixels = _sizes(dy)
    block_c = _block_c(dy)
    block_m, across = 2048 // block_c, triton.cdiv(channels, block_c)
    count, chunk = _triton.tasks(pixels, block_m, 1024 // (images * across))
    parts = dy.new_empty(images, count, *(() if x is None else (2,)), channels, dtype=torch.float32)
    se_residual_sums_kernel[(images * count, across)](
        dy, x, bn, parts, pixels, channels, chunk, count, WIDE=_triton.wide(dy), BLOCK_M=block_m, BLOCK_C=block_c
    )
    return parts, count


def _apply(skip: Tensor | None, x: Tensor, ab: Tensor, y: Tensor) -> None:
    images, channels, pixels = _sizes(x)
    block_c = _block_c(x)

    def grid(tile):
        return images * triton.cdiv(pixels, tile["BLOCK"] // block_c), triton.cdiv(channels, block_c)

    se_residual_apply_kernel[grid](skip, x, ab, y, pixels, channels, WIDE=_triton.wide(x), BLOCK_C=block_c)


def _gate_tile(channels: int, hidden: int) -> dict[str, int]:
    """Of the two linear layers' weights, 4096 values at a time."""
    block_h = _triton.power_of_2(hidden, 1 << 16)
    return {"BLOCK_H": block_h, "BLOCK_C": _triton.power_of_2(channels, max(4096 // block_h, 16))}
