"""The tables of a normalisation on a GPU: coefficients [5, C] with the running statistics, and gradients [7, C]. Arithmetic in
float64; numbers per channel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._tile import MEAN, RSTD, SCALE, SHIFT, VAR, load_row, store_row
from nvae_fast.kernels.bn_act.ops import GRADIENTS


@triton.jit
def move_row(running_ptr, stride, found, rate, c, C):
    """running <- (1 - rate) running + rate found, in float64"""
    old = tl.load(running_ptr + c * stride, mask=c < C, other=0.0).to(tl.float64)
    new = old * (1.0 - rate) + found * rate
    tl.store(running_ptr + c * stride, new.to(running_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def bn_act_coefficients_kernel(stats_ptr, weight_ptr, bias_ptr, offset_ptr, bn_ptr, mean_ptr, var_ptr, batches_ptr, eps, rate,
                               unbiased, C, MEAN_STRIDE, VAR_STRIDE, AVERAGE: tl.constexpr,
                               BLOCK_C: tl.constexpr):  # fmt: skip
    """One program for all channels: batches changes once, behind those who read it. AVERAGE: the rate is 1 / batches."""
    rate = tl.cast(rate, tl.float64)
    if AVERAGE:
        rate = 1.0 / (tl.load(batches_ptr) + 1).to(tl.float64)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        mean, var = load_row(stats_ptr, 0, c, C), load_row(stats_ptr, 1, c, C)
        rstd = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
        scale = rstd
        if weight_ptr is not None:
            scale = rstd * load_row(weight_ptr, 0, c, C)
        shift = -mean * scale
        if bias_ptr is not None:
            shift += load_row(bias_ptr, 0, c, C)
        store_row(bn_ptr, MEAN, c, C, mean)
        store_row(bn_ptr, VAR, c, C, var)
        store_row(bn_ptr, RSTD, c, C, rstd)
        store_row(bn_ptr, SCALE, c, C, scale)
        store_row(bn_ptr, SHIFT, c, C, shift)
        if mean_ptr is not None:
            found = mean.to(tl.float64)
            if offset_ptr is not None:
                found += load_row(offset_ptr, 0, c, C)
            move_row(mean_ptr, MEAN_STRIDE, found, rate, c, C)
            move_row(var_ptr, VAR_STRIDE, var.to(tl.float64) * unbiased, rate, c, C)
    if batches_ptr is not None:
        tl.debug_barrier()
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def affine_terms(bn_ptr, total, moment, share, c, C):
    """c1, c2 of dx = scale du + c1 x + c2, from sum(du), sum(du (x - mean)) in float64, share = 1 / count. 0 (fixed statistics)
    gives zeros, also where a sum is NaN, which then stays in its element."""
    mean, scale, rstd = load_row(bn_ptr, MEAN, c, C), load_row(bn_ptr, SCALE, c, C), load_row(bn_ptr, RSTD, c, C).to(tl.float64)
    c1 = tl.where(share > 0, -scale * rstd * rstd * moment * share, 0.0)
    c2 = tl.where(share > 0, -scale.to(tl.float64) * total * share - c1 * mean, 0.0)
    return c1, c2


@triton.jit
def store_gradients(out_ptr, bn_ptr, total, moment, share, c, C):
    """The table of gradients [7, C] from sum(du), sum(du (x - mean)) in float64, share = 1 / count. The last row, the offset's,
    is 0 but behind fixed statistics (share 0), or NaN."""
    c1, c2 = affine_terms(bn_ptr, total, moment, share, c, C)
    scale = load_row(bn_ptr, SCALE, c, C)
    store_row(out_ptr, 0, c, C, total)
    store_row(out_ptr, 1, c, C, moment)
    store_row(out_ptr, 2, c, C, moment * load_row(bn_ptr, RSTD, c, C))
    store_row(out_ptr, 3, c, C, scale)
    store_row(out_ptr, 4, c, C, c1)
    store_row(out_ptr, 5, c, C, c2)
    store_row(out_ptr, 6, c, C, tl.where(share > 0, 0.0, scale.to(tl.float64)) * total)


@triton.jit
def bn_act_gradients_kernel(sums_ptr, bn_ptr, out_ptr, share, C, BLOCK_C: tl.constexpr):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = load_row(sums_ptr, 0, c, C).to(tl.float64)
    moment = load_row(sums_ptr, 1, c, C).to(tl.float64)
    store_gradients(out_ptr, bn_ptr, total, moment, share, c, C)


def bn_act_coefficients(stats: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
                        running_mean: Tensor | None = None, running_var: Tensor | None = None, batches: Tensor | None = None,
                        rate: float | None = None, count: float = 0.0, offset: Tensor | None = None) -> Tensor:  # fmt: skip
    channels = stats.shape[1]
    stats, bn = _triton.floats("statistics", stats, 2, channels), stats.new_empty(5, channels)
    beside = {"weight": weight, "bias": bias, "offset": offset}
    weight, bias, offset = (_triton.floats(name, t, channels) for name, t in beside.items())
    if (running_mean is None) != (running_var is None):
        raise RuntimeError("bn_act: expected both running_mean and running_var, or neither")
    for running in (running_mean, running_var):
        if running is not None and running.shape != (channels,):
            raise RuntimeError(f"running statistics have shape {tuple(running.shape)}; expected {(channels,)}")
    if batches is not None and batches.numel() != 1:
        raise RuntimeError(f"the number of batches has shape {tuple(batches.shape)}; expected a scalar")
    average = rate is None and running_mean is not None
    if average and batches is None:
        raise RuntimeError("bn_act: an average over all batches needs their number")
    if not count > 0:  # an empty batch counts and says nothing
        running_mean = running_var = None
    strides = [0 if t is None else t.stride(0) for t in (running_mean, running_var)]
    numbers = eps, rate or 0.0, count / max(count - 1.0, 1.0) if count < float("inf") else 1.0
    bn_act_coefficients_kernel[(1,)](
        *(stats, weight, bias, offset, bn, running_mean, running_var, batches, *numbers, channels, *strides),
        **dict(AVERAGE=average, BLOCK_C=_triton.power_of_2(channels, 1024)),
    )
    return bn


def bn_act_gradients(sums: Tensor, bn: Tensor, count: float) -> Tensor:
    channels = sums.shape[1]
    sums = _triton.floats("sums", sums, 2, channels)
    bn, out = _triton.floats("coefficients", bn, 5, channels), sums.new_empty(GRADIENTS, channels)
    if channels:
        grid = (triton.cdiv(channels, 128),)
        bn_act_gradients_kernel[grid](sums, bn, out, share(count), channels, BLOCK_C=128)
    return out


def share(count: float) -> float:
    """What a value has of a mean over `count` values; nothing where the statistics stand fixed."""
    return 1.0 / count if count else 0.0
