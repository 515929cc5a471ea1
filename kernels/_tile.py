"""What the Triton kernels share on the GPU's side: tiles [BLOCK_M, BLOCK_C] of rows [M, C], and rows of tables [., C]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

MEAN, VAR, RSTD, SCALE, SHIFT = (tl.constexpr(row) for row in range(5))  # rows of bn [5, C]
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SWISH, ELU = tl.constexpr(1), tl.constexpr(2)  # positions in _norm.ACTIVATIONS


@triton.jit
def offset_of(index, WIDE: tl.constexpr):
    """An index from which offsets are computed: in 64 bits where a tensor needs them."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def multiple(n, UNIT: tl.constexpr):
    """n, a multiple of UNIT (`_triton.unit`): the compiler, which finds multiples of 16 alone, reads rows that wide."""
    return n // UNIT * UNIT


@triton.jit
def pointer_in(item, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a field of an item of a table (_lists.py)."""
    address = tl.load(item + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def load_pitched(ptr, m, c, M, C, PITCH):
    """[BLOCK_M, BLOCK_C] of rows that are PITCH values apart, 0 outside."""
    return tl.load(ptr + m[:, None] * PITCH + c[None, :], mask=(m < M)[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def load_rows(ptr, m, c, M, C):
    """[BLOCK_M, BLOCK_C] as float32, 0 outside."""
    return load_pitched(ptr, m, c, M, C, C).to(tl.float32)


@triton.jit
def store_rows(ptr, m, c, M, C, value):
    inside = (m < M)[:, None] & (c < C)[None, :]
    tl.store(ptr + m[:, None] * C + c[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_row(ptr, row, c, C):
    return tl.load(ptr + row * C + c, mask=c < C, other=0.0)


@triton.jit
def store_row(ptr, row, c, C, value):
    tl.store(ptr + row * C + c, value.to(ptr.dtype.element_ty), mask=c < C)


@triton.jit
def store_taps(w_ptr, taps_ptr, c, C, TAPS: tl.constexpr):
    """taps [TAPS^2, C] of the weight [C, TAPS^2] of a depthwise convolution, those of the channels c"""
    for tap in range(TAPS * TAPS):
        tl.store(taps_ptr + tap * C + c, tl.load(w_ptr + c * TAPS * TAPS + tap, mask=c < C), mask=c < C)


@triton.jit
def activate(u, ACT: tl.constexpr):
    if ACT == SWISH:
        u = u * tl.sigmoid(u)
    if ACT == ELU:
        u = tl.where(u > 0, u, tl.exp(u) - 1.0)
    return u


@triton.jit
def differentiate(dy, u, ACT: tl.constexpr):
    """dy act'(u)"""
    if ACT == SWISH:
        s = tl.sigmoid(u)
        dy = dy * (s + u * s * (1.0 - s))
    if ACT == ELU:
        dy = dy * tl.where(u > 0, 1.0, tl.exp(u))
    return dy


@triton.jit
def affine_rows(du, x, c0, c1, c2, also_ptr, also2_ptr, m, c, M, C):
    """c0 du + c1 x + c2, and what else there is at rows m"""
    dx = du * c0[None, :] + x * c1[None, :] + c2[None, :]
    if also_ptr is not None:
        dx += load_rows(also_ptr, m, c, M, C)
    if also2_ptr is not None:
        dx += load_rows(also2_ptr, m, c, M, C)
    return dx
