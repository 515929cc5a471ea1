"""The tables of a normalisation on a GPU: coefficients [5, C] with the running statistics, and gradients [7, C]. Arithmetic in
float64; numbers per channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _norm, _triton
from nvae_fast.kernels._tile import MEAN, RSTD, SCALE, SHIFT, VAR, load_row, store_row
from nvae_fast.kernels.bn_act.ops import GRADIENTS

NOTHING = (None,) * 11  # no normalisation follows: of `following`'s length, since Triton 3.6 cannot ask whether a tuple is None


@triton.jit
def move_row(running_ptr, stride, found, rate, c, C):
    """running <- (1 - rate) running + rate found, in float64"""
    old = tl.load(running_ptr + c * stride, mask=c < C, other=0.0).to(tl.float64)
    new = old * (1.0 - rate) + found * rate
    tl.store(running_ptr + c * stride, new.to(running_ptr.dtype.element_ty), mask=c < C)


@triton.jit
def store_coefficients(bn_ptr, mean, var, rate, c, C, norm):
    """The table bn [5, C] of a normalisation (`following`), and its running statistics moved."""
    weight_ptr, bias_ptr, offset_ptr, mean_ptr, var_ptr, _, eps, _, unbiased, MEAN_STRIDE, VAR_STRIDE = norm
    mean, var = mean.to(tl.float32), var.to(tl.float32)  # the same bits whether they were stored in between or not
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


@triton.jit
def store_stats(out_ptr, mean, var, block, c, C, norm):
    """Of the columns c, of which `block` is the number: mean and variance [2, C], or the table [5, C] of the normalisation
    that follows, with what a batch moves moved. To be called by the one program that has them (`joined_stats`)."""
    if norm[6] is None:  # eps
        store_row(out_ptr, MEAN, c, C, mean)
        store_row(out_ptr, VAR, c, C, var)
    else:
        batches_ptr, rate = norm[5], tl.cast(norm[7], tl.float64)
        if batches_ptr is not None:
            if block == 0:
                tl.store(batches_ptr, tl.load(batches_ptr) + 1)
        store_coefficients(out_ptr, mean, var, rate, c, C, norm)


@triton.jit
def bn_act_coefficients_kernel(stats_ptr, bn_ptr, norm, C, AVERAGE: tl.constexpr, BLOCK_C: tl.constexpr):
    """One program for all channels: batches changes once, behind those who read it. AVERAGE: the rate is 1 / batches."""
    batches_ptr, rate = norm[5], tl.cast(norm[7], tl.float64)
    if AVERAGE:
        rate = 1.0 / (tl.load(batches_ptr) + 1).to(tl.float64)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        store_coefficients(bn_ptr, load_row(stats_ptr, 0, c, C), load_row(stats_ptr, 1, c, C), rate, c, C, norm)
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
    average = rate is None and running_mean is not None
    if average and batches is None:
        raise RuntimeError("bn_act: an average over all batches needs their number")
    given = _norm.Following([eps, rate or 0.0, 1.0], weight, bias, offset, running_mean, running_var, batches)
    bn_act_coefficients_kernel[(1,)](
        *(stats, bn, following(given, channels, count), channels),
        **dict(AVERAGE=average, BLOCK_C=_triton.power_of_2(channels, 1024)),
    )
    return bn


def following(norm: Sequence[Any], channels: int, count: float) -> tuple[Any, ...]:
    """What kernels take of the normalisation (`_norm.Following`) behind statistics of `count` values; `NOTHING` where there is
    none."""
    n = _norm.Following(*norm)
    if not n.numbers:
        return NOTHING
    beside = {"weight": n.weight, "bias": n.bias, "offset": n.offset}
    tables = [_triton.floats(name, t, channels) for name, t in beside.items()]
    running = n.running_mean, n.running_var
    if (n.running_mean is None) != (n.running_var is None):
        raise RuntimeError("bn_act: expected both running_mean and running_var, or neither")
    for t in running:
        if t is not None and t.shape != (channels,):
            raise RuntimeError(f"running statistics have shape {tuple(t.shape)}; expected {(channels,)}")
    if n.batches is not None and n.batches.numel() != 1:
        raise RuntimeError(f"the number of batches has shape {tuple(n.batches.shape)}; expected a scalar")
    eps, rate, copies = n.numbers
    count *= copies
    if not count > 0:  # an empty batch counts and says nothing
        running = None, None
    unbiased = count / max(count - 1.0, 1.0) if count < float("inf") else 1.0
    return *tables, *running, n.batches, eps, rate, unbiased, *(0 if t is None else t.stride(0) for t in running)


def zero_stats(like: Tensor, channels: int, stats: bool, norm: Sequence[Any], count: float) -> Tensor:
    """What a launcher returns as statistics of an image with `count` zeros a channel, where it launches nothing."""
    found, n = like.new_zeros(2 if stats else 0, channels, dtype=torch.float32), _norm.Following(*norm)
    if not (stats and n.numbers):
        return found
    eps, rate, copies = n.numbers
    running = n.running_mean, n.running_var, n.batches
    return bn_act_coefficients(found, n.weight, n.bias, eps, *running, rate, count * copies, n.offset)


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
