"""What the kernels of the mixture share: elementary functions, and where things are in params."""

from __future__ import annotations

import triton
import triton.language as tl

from nvae_fast.kernels._math import bits_of, exp_of, exp_parts, float_of


@triton.jit
def exp_or_tiny(y):
    """For y <= 80; below -80 it is exp(-80), which is nothing beside 1."""
    return exp_of(tl.where(y < -80.0, -80.0, y))


@triton.jit
def exp_or_zero(y):
    return tl.where(y < -80.0, 0.0, exp_or_tiny(y))


@triton.jit
def one_less_exp(y):
    """(exp(y), 1 - exp(y)) for y <= 0"""
    scale, p = exp_parts(tl.where(y < -80.0, -80.0, y))
    return scale + scale * p, -(scale * p + (scale - 1.0))


@triton.jit
def signed_as(magnitude, sign):
    return float_of(bits_of(magnitude) ^ (bits_of(sign) & -2147483648))


@triton.jit
def tanh_both(x):
    """tanh and its slope from e = exp(-2|x|): tanh|x| = (1 - e) / (1 + e) = 1 - 2e / (1 + e), whichever keeps more digits."""
    e, rest = one_less_exp(-2.0 * tl.abs(x))
    large = e < 0.3
    q = tl.where(large, 2.0 * e, rest) / (1.0 + e)
    other = 1.0 - q
    return signed_as(tl.where(large, other, q), x), tl.where(large, q * (1.0 + other), other * (1.0 + q))


@triton.jit
def row_of(c, K: tl.constexpr, C: tl.constexpr, M: tl.constexpr):
    """The first of the M rows of params with the means (K = 0) or log-scales (1) of channel c, or the coefficients (2) of pair
    c."""
    if C == 3:
        row = M + 3 * M * c + K * M
    elif K == 2:
        row = M + 2 * M * C + M * c
    else:
        row = M + 2 * M * c + K * M
    return row
