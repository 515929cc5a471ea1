"""Float functions of the Triton kernels, those of csrc/common/math.h: the same digits in the interpreter and on every GPU but
for the last one, where tl.exp and tl.log may be off by two or three. NaN comes out where NaN went in, but for log_positive."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_to_step(x, inverse_step):
    """x inverse_step rounded to an integer n: (a float that holds n in its low bits, n). The addend is 1.5 * 2^23."""
    shifted = x * inverse_step + 12582912.0
    return shifted, shifted - 12582912.0


@triton.jit
def exp_reduced(shifted, r):
    """exp(n ln2 + r), |r| <= ln2 / 2, |n| <= 126, as (scale, p): scale (1 + p). The polynomial is a minimax fit."""
    c = 1.3882512e-3 * r + 8.366521e-3
    c = c * r + 4.16672e-2
    c = c * r + 1.6666543e-1
    c = c * r + 4.9999997e-1
    return float_of((bits_of(shifted) << 23) + 0x3F800000), r + r * r * c


@triton.jit
def exp_parts(y, rest=0.0):
    """exp(y + rest), |y| <= 80, as (scale, p); rest is what rounding took from y."""
    shifted, n = round_to_step(y, 1.44269504)
    return exp_reduced(shifted, ((y - n * 0.693359375) + n * 2.12194440e-4) + rest)


@triton.jit
def exp_of(y):
    """exp(y), |y| <= 80; within one unit in the last place."""
    scale, p = exp_parts(y)
    return scale + scale * p


@triton.jit
def log_positive(x):
    """Natural logarithm of a positive normal number, within one unit (fdlibm's reduction and coefficients)."""
    u = bits_of(x)
    k = (u - 0x3F3504F3) >> 23  # mantissa in [sqrt(1/2), sqrt(2))
    f = float_of(u - (k << 23)) - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    series = z * (0.66666662693 + w * 0.28498786688) + w * (0.40000972152 + w * 0.24279078841)
    half, n = 0.5 * f * f, k.to(tl.float32)
    return s * (half + series) + n * 9.0580006145e-6 - half + f + n * 6.9313812256e-1
