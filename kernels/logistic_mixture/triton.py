"""logistic_mixture_log_prob on a GPU: kernels, then launchers. Derivation: README.md, "The native form"; the arithmetic is that
of csrc/logistic_mixture. A program has some pixels of an image times all mixtures, [BLOCK_P, BLOCK_M], and loops over channels.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._math import log_positive
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels.logistic_mixture._device import (
    exp_or_tiny,
    exp_or_zero,
    one_less_exp,
    row_of,
    signed_as,
    tanh_both,
)
from nvae_fast.kernels.logistic_mixture._sample import logistic_mixture_sample_fwd

__all__ = ["logistic_mixture_log_prob_bwd", "logistic_mixture_log_prob_fwd", "logistic_mixture_sample_fwd"]

VALUES = 512  # of a tile, in 4 warps


@triton.jit
def element(d, raw, i, y, half_bin, log_bin, top):
    """One channel under a component: (factor, rest) with log P = log(factor) + rest and 1e-5 < factor <= 1, and the derivatives
    of log P by d and by the log-scale. The inner cases are even in d: they are computed at |d|, where plus >= 0. The density is
    the mass with h -> 0."""
    l = tl.where(raw < -7.0, -7.0, raw)  # noqa: E741
    # Scaled after the sum, as the reference does it: near a boundary of the bin that keeps digits.
    near, h = tl.abs(d), i * half_bin
    a, plus, minus = i * near, i * (near + half_bin), i * (near - half_bin)
    v, gap = one_less_exp(-h)
    gap *= 1.0 + v  # 1 - exp(-2h)
    u = exp_or_tiny(-a)
    e_plus, e_minus = u * v, exp_or_tiny(-tl.abs(minus))

    # delta = exp(min(-minus, 0)) gap / ((1 + e_plus) (1 + e_minus)): a product, which keeps its digits in both tails.
    mass = tl.where(minus > 0.0, e_minus, 1.0) * gap > 1e-5 * ((1.0 + e_plus) * (1.0 + e_minus))
    plus_in, minus_in = tl.where(mass, plus, a), tl.where(mass, minus, a)
    ep, em = tl.where(mass, e_plus, u), tl.where(mass, e_minus, u)

    # Both edges are log sigmoid(t).
    bottom = y < -0.999
    edge = bottom | (y > top)
    outside = tl.where(bottom, d, -d) < 0.0
    t, e_t = tl.where(outside, -minus, plus), tl.where(outside, e_minus, e_plus)

    p1, m1, t1, g = 1.0 + ep, 1.0 + em, 1.0 + e_t, tl.where(mass, gap, 1.0)
    product = p1 * m1
    inverse = 1.0 / tl.where(edge, t1, product * g)
    q = inverse * g  # 1 / (p1 m1)

    # 1 / (1 + e_t) rounds to 1 where e_t is small: the last term gives log1p its digits back.
    log_edge = tl.where(t > 0.0, 0.0, t) + ((1.0 - inverse) - inverse * e_t)
    log_inner = tl.where(minus_in < 0.0, 0.0, -minus_in) + tl.where(mass, 0.0, log_bin - l)

    survival_t = tl.where(t > 0.0, e_t, 1.0) * inverse  # 1 - sigmoid(t)
    survival, cdf = ep * (m1 * q), tl.where(minus_in > 0.0, 1.0, em) * (p1 * q)
    slope_of_gap = tl.where(mass, 2.0 * h * (v * v) * (product * inverse), 1.0)
    by_l = tl.where(edge, -t * survival_t, minus_in * cdf - plus_in * survival - slope_of_gap)
    by_d = tl.where(edge, tl.where(bottom, survival_t, -survival_t), signed_as(survival - cdf, d))
    return tl.where(edge, inverse, g * q), tl.where(edge, log_edge, log_inner), i * by_d, tl.where(raw >= -7.0, by_l, 0.0)


@triton.jit
def softmax_parts(v):
    """(max, exp(v - max), their sum) over the mixtures; v is -inf where there is none."""
    top = tl.max(v, 1)[:, None]
    e = exp_or_zero(v - top)
    return top, e, tl.sum(e, 1)[:, None]


@triton.jit
def log_or_nan(x):
    return log_positive(x) + (x - x)


@triton.jit
def components(pixels_ptr, x_c, x_p, params_ptr, params_c, params_p, p, k, P, half_bin, log_bin, top_level, C: tl.constexpr,
               M: tl.constexpr):  # fmt: skip
    """Log-probability of each component, with its share of the softmax of the logits; that share; and derivatives of log P, a
    tile each: by d and the log-scale of each channel, and by the raw coefficient of each pair, over that by the mean."""
    real, at = (k < M)[None, :], p[:, None] * params_p + k[None, :] * params_c
    inside = (p < P)[:, None] & real
    logits = tl.load(params_ptr + at, mask=inside, other=0.0).to(tl.float32)
    highest, share, total = softmax_parts(tl.where(real, logits, float("-inf")))
    term = (logits - highest) - log_or_nan(total)
    factor = tl.zeros_like(term) + 1.0
    image, by_d, by_l, by_raw = (), (), (), ()
    for c in tl.static_range(C):
        y = 2.0 * tl.load(pixels_ptr + c * x_c + p * x_p, mask=p < P, other=0.0)[:, None] - 1.0
        mean = tl.load(params_ptr + row_of(c, 0, C, M) * params_c + at, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(params_ptr + row_of(c, 1, C, M) * params_c + at, mask=inside, other=0.0).to(tl.float32)
        d = y - mean
        for j in tl.static_range(c):
            pair = row_of(c * (c - 1) // 2 + j, 2, C, M) * params_c
            a, slope = tanh_both(tl.load(params_ptr + pair + at, mask=inside, other=0.0).to(tl.float32))
            d -= a * image[j]
            by_raw = by_raw + (image[j] * slope,)
        inverse_scale = exp_or_tiny(-tl.where(raw < -7.0, -7.0, raw))
        f, rest, by_d_c, by_l_c = element(d, raw, inverse_scale, y, half_bin, log_bin, top_level)
        term += rest
        factor *= f
        if c % 4 == 3 or c == C - 1:  # one logarithm for four factors, whose product is 1e-20 or more
            term += log_positive(factor)
            factor = tl.zeros_like(term) + 1.0
        image, by_d, by_l = image + (y,), by_d + (by_d_c,), by_l + (by_l_c,)
    return tl.where(real, term, float("-inf")), share / total, by_d, by_l, by_raw


@triton.jit
def place(P, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr):
    """(image, pixels [BLOCK_P], mixtures [BLOCK_M]) of a program"""
    blocks = tl.cdiv(P, BLOCK_P)
    p = offset_of(tl.program_id(0) % blocks, WIDE) * BLOCK_P + tl.arange(0, BLOCK_P)
    return offset_of(tl.program_id(0) // blocks, WIDE), p, offset_of(tl.arange(0, BLOCK_M), WIDE)


@triton.jit
def logistic_mixture_fwd_kernel(
    pixels_ptr, params_ptr, out_ptr, P, half_bin, log_bin, top_level, x_b, x_c, x_p, params_b, params_c, params_p,
    C: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    b, p, k = place(P, WIDE, BLOCK_P, BLOCK_M)
    term, _share, _d, _l, _raw = components(
        pixels_ptr + b * x_b,
        x_c,
        x_p,
        params_ptr + b * params_b,
        params_c,
        params_p,
        p,
        k,
        P,
        half_bin,
        log_bin,
        top_level,
        C,
        M,
    )
    top, _e, total = softmax_parts(term)
    tl.store(out_ptr + b * P + p, tl.sum(top + log_or_nan(total), 1), mask=p < P)


@triton.jit
def logistic_mixture_bwd_kernel(
    grad_ptr, pixels_ptr, params_ptr, dparams_ptr, P, half_bin, log_bin, top_level, x_b, x_c, x_p, params_b, params_c, params_p,
    out_b, out_c, out_p, C: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    b, p, k = place(P, WIDE, BLOCK_P, BLOCK_M)
    term, share_of_logit, by_d, by_l, by_raw = components(
        pixels_ptr + b * x_b,
        x_c,
        x_p,
        params_ptr + b * params_b,
        params_c,
        params_p,
        p,
        k,
        P,
        half_bin,
        log_bin,
        top_level,
        C,
        M,
    )
    grad = tl.load(grad_ptr + b * P + p, mask=p < P, other=0.0)[:, None]
    _top, e, total = softmax_parts(term)
    share = grad * (e / total)
    inside = (p < P)[:, None] & (k < M)[None, :]
    out = dparams_ptr + b * out_b + p[:, None] * out_p + k[None, :] * out_c
    tl.store(out, (share - grad * share_of_logit).to(dparams_ptr.dtype.element_ty), mask=inside)
    for c in tl.static_range(C):
        dmean = -by_d[c] * share
        tl.store(out + row_of(c, 0, C, M) * out_c, dmean.to(dparams_ptr.dtype.element_ty), mask=inside)
        tl.store(out + row_of(c, 1, C, M) * out_c, (by_l[c] * share).to(dparams_ptr.dtype.element_ty), mask=inside)
        for j in tl.static_range(c):
            draw = (by_raw[c * (c - 1) // 2 + j] * dmean).to(dparams_ptr.dtype.element_ty)
            tl.store(out + row_of(c * (c - 1) // 2 + j, 2, C, M) * out_c, draw, mask=inside)


def logistic_mixture_log_prob_fwd(x: Tensor, params: Tensor, num_mixtures: int, num_bits: int, fixed: bool) -> Tensor:
    x, params, bins = _checked(x, params, num_mixtures, num_bits, fixed)
    out = x.new_empty(x.shape[0], *x.shape[2:])
    if out.numel():
        grid, tile = _tile(x, params, num_mixtures)
        logistic_mixture_fwd_kernel[grid](
            *(x, params, out, out[0].numel(), *bins, *_triton.line_strides(x), *_triton.line_strides(params)), **tile
        )
    return out


def logistic_mixture_log_prob_bwd(
    grad: Tensor, x: Tensor, params: Tensor, num_mixtures: int, num_bits: int, fixed: bool
) -> Tensor:
    found = torch.empty_like(params)
    x, params, bins = _checked(x, params, num_mixtures, num_bits, fixed)
    grad = _triton.floats("the gradient", grad, x.shape[0], *x.shape[2:])
    out = _triton.as_lines(found)
    if grad.numel():
        grid, tile = _tile(x, params, num_mixtures)
        strides = *_triton.line_strides(x), *_triton.line_strides(params), *_triton.line_strides(out)
        logistic_mixture_bwd_kernel[grid](grad, x, params, out, grad[0].numel(), *bins, *strides, **tile)
    return found if out is found else found.copy_(out)


def _tile(x: Tensor, params: Tensor, mixtures: int):
    """(grid, the kernels' constants)"""
    block_m = _triton.power_of_2(mixtures, 1 << 16)
    block_p = min(max(VALUES // block_m, 1), _triton.power_of_2(x.shape[2] * x.shape[3], VALUES))
    grid = (x.shape[0] * triton.cdiv(x.shape[2] * x.shape[3], block_p),)
    wide = _triton.wide(x) or _triton.wide(params)
    return grid, {"C": x.shape[1], "M": mixtures, "WIDE": wide, "BLOCK_P": block_p, "BLOCK_M": block_m}


def _checked(x: Tensor, params: Tensor, mixtures: int, bits: int, fixed: bool) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """x and params as lines, and (half a bin, log of a bin, the least y of the top level)."""
    fits = x.dim() == params.dim() == 4 and x.shape[0] == params.shape[0] and x.shape[2:] == params.shape[2:]
    if not fits or x.dtype != torch.float32:
        raise RuntimeError(
            f"x has shape {tuple(x.shape)} and type {x.dtype}; expected float32 beside params {tuple(params.shape)}"
        )
    c = x.shape[1]
    expected = mixtures * (1 + 2 * c + c * (c - 1) // 2)
    if mixtures < 1 or params.shape[1] != expected:
        raise RuntimeError(f"params has {params.shape[1]} channels; expected {expected}: {c} colours, {mixtures} mixtures")
    if not 1 <= bits <= 8:
        raise RuntimeError(f"num_bits is {bits}; expected 1 to 8 bits")
    top = 2**bits - 1
    return _triton.as_lines(x), _triton.as_lines(params), (1.0 / top, -math.log(top / 2.0), 0.999 if fixed else 0.99)
