"""What se_residual's kernels do per image and per parameter, on the GPU's side."""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._join import load_parts
from nvae_fast.kernels._tile import (
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    load_pitched,
    load_row,
    load_rows,
    offset_of,
    store_row,
    store_rows,
)
from nvae_fast.kernels.bn_act.tables import affine_terms


@triton.jit
def load_shift(bn_ptr, c, C, BIAS: tl.constexpr):
    """What is added to the scaled x: of a normalisation [5, C], or bn itself where it is a BIAS [C]."""
    return load_row(bn_ptr, 0 if BIAS else SHIFT, c, C)


@triton.jit
def store_parts(task, dy_ptr, x_ptr, bn_ptr, parts_ptr, P, C, CHUNK, TASKS, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """parts [N, tasks, 2, C]: sum(dy), sum(dy (x - mean)) over CHUNK pixels, mean 0 without bn; or sum(dy) [N, tasks, C]"""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
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
def add_parts(parts_ptr, image, TASKS, KINDS: tl.constexpr, KIND: tl.constexpr, c, C):
    """Sum over the tasks of an image, of one kind of parts [N, tasks, KINDS, C]."""
    total = tl.zeros([8, c.shape[0]], tl.float32)
    for t0 in range(0, TASKS, 8):
        t = image * TASKS + t0 + tl.arange(0, 8)
        total += load_parts(parts_ptr + KIND * C, t, c, image * TASKS + TASKS, C, KINDS * C)
    return tl.sum(total, 0)


@triton.jit
def pooled_of(mean, bn_ptr, c, C, BIAS: tl.constexpr):
    """The mean of v from that of x"""
    if bn_ptr is not None:
        if not BIAS:
            mean *= load_row(bn_ptr, SCALE, c, C)
        mean += load_shift(bn_ptr, c, C, BIAS)
    return mean


@triton.jit
def squeeze(total, b1_ptr, H, BLOCK_H: tl.constexpr):
    """The hidden units, of the products [BLOCK_H, .] of w1 and the means of v"""
    h = tl.arange(0, BLOCK_H)
    hidden = tl.sum(total, 1) + load_row(b1_ptr, 0, h, H)
    return tl.where((hidden <= 0) | (h >= H), 0.0, hidden)  # NaN stays


@triton.jit
def excite(hidden, w2_ptr, b2_ptr, c, C, H, BLOCK_H: tl.constexpr):
    """What the sigmoid of the channels c is taken of"""
    weights = load_rows(w2_ptr, c, tl.arange(0, BLOCK_H), C, H)
    return tl.sum(weights * hidden[None, :], 1) + load_row(b2_ptr, 0, c, C)


@triton.jit
def store_gate(state, t, c, C):
    gate = tl.sigmoid(t)
    store_row(state, 1, c, C, gate)
    store_row(state, 2, c, C, gate * tl.sigmoid(-t))  # a rounded gate has lost the digits of 1 - gate


@triton.jit
def gate_of(image, first, block, means_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, c, C, H, BIAS: tl.constexpr,
            BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The gate of an image at c, from its means [N, C] of x. The `first` of its programs of this block of channels leaves that
    part of its state."""
    state = state_ptr + image * (3 * C + H)
    h = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    for w0 in range(0, C, BLOCK_W):
        w = w0 + tl.arange(0, BLOCK_W)
        pooled = pooled_of(load_row(means_ptr, image, w, C), bn_ptr, w, C, BIAS)
        total += load_rows(w1_ptr, h, w, H, C) * pooled[None, :]
    hidden = squeeze(total, b1_ptr, H, BLOCK_H)
    t = excite(hidden, w2_ptr, b2_ptr, c, C, H, BLOCK_H)
    if first:
        store_row(state, 0, c, C, load_row(means_ptr, image, c, C))
        store_gate(state, t, c, C)
        if block == 0:
            store_row(state + 3 * C, 0, h, H, hidden)
    return tl.sigmoid(t)


@triton.jit
def find_gate(image, parts_ptr, bn_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, state_ptr, inverse, C, H, TASKS, BIAS: tl.constexpr,
              BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The state of an image, from the sums of x times `inverse`."""
    state = state_ptr + image * (3 * C + H)
    h = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mean = add_parts(parts_ptr, image, TASKS, 1, 0, c, C) * inverse
        store_row(state, 0, c, C, mean)
        total += load_rows(w1_ptr, h, c, H, C) * pooled_of(mean, bn_ptr, c, C, BIAS)[None, :]
    hidden = squeeze(total, b1_ptr, H, BLOCK_H)
    store_row(state + 3 * C, 0, h, H, hidden)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        store_gate(state, excite(hidden, w2_ptr, b2_ptr, c, C, H, BLOCK_H), c, C)


@triton.jit
def factor_of(state_ptr, bn_ptr, image, residual_scale, c, C, H, BIAS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(s gate, s gate scale): what v and what x are multiplied by. Without state the gate is 1, without a norm the scale."""
    a = tl.zeros([BLOCK_C], tl.float32) + residual_scale
    if state_ptr is not None:
        a *= load_row(state_ptr + image * (3 * C + H), 1, c, C)
    if (bn_ptr is not None) and (not BIAS):
        return a, a * load_row(bn_ptr, SCALE, c, C)
    else:
        return a, a


@triton.jit
def find_shares(image, parts_ptr, bn_ptr, w1_ptr, w2_ptr, state_ptr, shares_ptr, residual_scale, C, H, TASKS,
                BIAS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The shares of an image, from its sum(dy) and sum(dy (x - mean)); with bn those of bias and scale."""
    state, shares = state_ptr + image * (3 * C + H), shares_ptr + image * (4 * C + H)
    h = tl.arange(0, BLOCK_H)
    dhidden = tl.zeros([BLOCK_H], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        dgate = add_parts(parts_ptr, image, TASKS, 2, 1, c, C)
        if bn_ptr is not None:
            bias = load_shift(bn_ptr, c, C, BIAS)
            if not BIAS:
                scale = load_row(bn_ptr, SCALE, c, C)
                bias += load_row(bn_ptr, MEAN, c, C) * scale
                dgate *= scale
            dgate += add_parts(parts_ptr, image, TASKS, 2, 0, c, C) * bias
        dgate *= residual_scale * load_row(state, 2, c, C)
        store_row(shares, 3, c, C, dgate)
        dhidden += tl.sum(load_rows(w2_ptr, c, h, C, H) * dgate[:, None], 0)
    dhidden = tl.where((load_row(state + 3 * C, 0, h, H) <= 0) | (h >= H), 0.0, dhidden)
    store_row(shares + 4 * C, 0, h, H, dhidden)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        dmean = tl.sum(load_rows(w1_ptr, h, c, H, C) * dhidden[:, None], 0)
        store_row(shares, 2, c, C, dmean)
        if bn_ptr is not None:
            a = residual_scale * load_row(state, 1, c, C)
            store_row(shares, 0, c, C, a * add_parts(parts_ptr, image, TASKS, 2, 0, c, C) + dmean)
            if not BIAS:
                off = load_row(state, 0, c, C) - load_row(bn_ptr, MEAN, c, C)
                store_row(shares, 1, c, C, a * add_parts(parts_ptr, image, TASKS, 2, 1, c, C) + dmean * off)


@triton.jit
def add_images(program, shares_ptr, state_ptr, bn_ptr, dbn_ptr, dw1_ptr, db1_ptr, dw2_ptr, db2_ptr, residual_scale, share, ROWS,
               C, H, BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Gradients of parameters, for a block of channels and of hidden units: sums in float64 over the rows of `shares`, which
    are images or, without state, the parts [N, tasks, 2, C] of sum(dy) and sum(dy (x - mean)), or [N, tasks, C] for a bias. dbn
    as of `ApplyNorm`, with share = 1 / count of x, or the gradient [C] of a bias."""
    blocks = tl.cdiv(C, BLOCK_W)
    c, h = program % blocks * BLOCK_W + tl.arange(0, BLOCK_W), program // blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    dbias = tl.zeros([BLOCK_W], tl.float64)
    dscale = tl.zeros([BLOCK_W], tl.float64)
    db2 = tl.zeros([BLOCK_W], tl.float64)
    db1 = tl.zeros([BLOCK_H], tl.float64)
    dw1 = tl.zeros([BLOCK_H, BLOCK_W], tl.float64)
    dw2 = tl.zeros([BLOCK_W, BLOCK_H], tl.float64)
    pitch = C if BIAS else 2 * C
    if state_ptr is not None:
        pitch = 4 * C + H
    for n0 in range(0, ROWS, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        if bn_ptr is not None:
            dbias += tl.sum(load_pitched(shares_ptr, n, c, ROWS, C, pitch).to(tl.float64), 0)
            if not BIAS:
                dscale += tl.sum(load_pitched(shares_ptr + C, n, c, ROWS, C, pitch).to(tl.float64), 0)
        if state_ptr is not None:
            dgate = load_pitched(shares_ptr + 3 * C, n, c, ROWS, C, pitch)
            dhidden = load_pitched(shares_ptr + 4 * C, n, h, ROWS, H, pitch)
            pooled = load_pitched(state_ptr, n, c, ROWS, C, 3 * C + H)
            hidden = load_pitched(state_ptr + 3 * C, n, h, ROWS, H, 3 * C + H)
            if bn_ptr is not None:
                if not BIAS:
                    pooled *= load_row(bn_ptr, SCALE, c, C)[None, :]
                pooled += load_shift(bn_ptr, c, C, BIAS)[None, :]
            db2 += tl.sum(dgate.to(tl.float64), 0)
            db1 += tl.sum(dhidden.to(tl.float64), 0)
            dw1 += tl.sum(dhidden[:, :, None] * pooled[:, None, :], 0)
            dw2 += tl.sum(dgate[:, :, None] * hidden[:, None, :], 0)
    if bn_ptr is not None:
        if state_ptr is None:
            dbias, dscale = residual_scale * dbias, residual_scale * dscale
        store_row(dbn_ptr, 0 if BIAS else SHIFT, c, C, dbias)
        if not BIAS:
            c1, c2 = affine_terms(bn_ptr, dbias, dscale, share, c, C)
            store_row(dbn_ptr, 0, c, C, dscale * load_row(bn_ptr, RSTD, c, C))
            store_row(dbn_ptr, 1, c, C, c1)
            store_row(dbn_ptr, 2, c, C, c2)
            store_row(dbn_ptr, SCALE, c, C, dscale)
    if state_ptr is not None:
        store_rows(dw1_ptr, h, c, H, C, dw1)
        store_row(db1_ptr, 0, h, H, db1)
        store_rows(dw2_ptr, c, h, C, H, dw2)
        store_row(db2_ptr, 0, c, C, db2)
