"""depthwise_conv on a GPU: launchers. Kernels: _device.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import GROUPS, NO_JOIN, join
from nvae_fast.kernels._norm import Following
from nvae_fast.kernels.bn_act import triton as bn_act
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image
from nvae_fast.kernels.bn_act.tables import following, share, zero_stats
from nvae_fast.kernels.depthwise_conv._device import (
    depthwise_conv_bwd_kernel,
    depthwise_conv_fwd_kernel,
    depthwise_conv_g_kernel,
)


def depthwise_conv_fwd(x: Tensor, bn: Tensor | None, act: int, weight: Tensor, stride: int, dilation: int, upsample: int,
                       stats: bool, *norm: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, sizes = _triton.image("x", x), _sizes(x, weight, stride, dilation, upsample)
    y = empty_image(x, *x.shape[:2], sizes["OUT_H"], sizes["OUT_W"])
    if not y.numel():
        return y, zero_stats(y, y.shape[1], stats, norm, 0)
    a, taps = _activated(x, bn, act, weight)
    rows, grid, chunk, tile = _tasks(y)
    out, behind = y.new_empty(Following(*norm).rows(stats), y.shape[1], dtype=torch.float32), following(norm, y.shape[1], rows)
    parts = join(y, grid[0], y.shape[1], grid[1]) if stats else NO_JOIN
    depthwise_conv_fwd_kernel[grid](a, taps, y, out, behind, *parts, M=rows, CHUNK=chunk, WIDE=_wide(x, y), **sizes, **tile)
    return y, out


def depthwise_conv_bwd(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int, weight: Tensor,
                       stride: int, dilation: int, upsample: int,
                       count: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    du = empty_image(x, *x.shape)
    return du, *_backward(dy, y, c, x, bn, act, weight, stride, dilation, upsample, count, du)


def depthwise_conv_bwd_(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int,
                        weight: Tensor, dilation: int, count: float = 0.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    # g is a tensor of its own where there is c: what follows it may be written over dy
    here = c is not None and dy.is_contiguous(memory_format=torch.channels_last)
    du = dy if here else empty_image(x, *x.shape)
    found = _backward(dy, y, c, x, bn, act, weight, 1, dilation, 1, count, du)
    if not here:
        dy.copy_(du)
    return found


def _backward(dy: Tensor, y: Tensor | None, c: Tensor | None, x: Tensor, bn: Tensor | None, act: int, weight: Tensor,
              stride: int, dilation: int, upsample: int, count: float, du: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(dweight, table of gradients), and du written"""
    x, sizes = _triton.image("x", x), _sizes(x, weight, stride, dilation, upsample)
    channels, like = x.shape[1], x.new_empty(()).expand(*x.shape[:2], sizes["OUT_H"], sizes["OUT_W"])
    dy = _triton.image("dy", dy, like)
    if (y is None) != (c is None):
        raise RuntimeError("depthwise_conv: expected both y and c, or neither")
    y, c = None if y is None else _triton.image("y", y, like), _triton.floats("c", c, 3, channels)
    bn = _triton.floats("coefficients", bn, 5, channels)
    table, dweight = x.new_empty(0 if bn is None else GRADIENTS, channels, dtype=torch.float32), weight.new_empty(weight.shape)
    if not x.numel():
        return dweight.zero_(), table.zero_()
    sizes["WIDE"] = _wide(x, dy)
    g, taps = _behind(dy, y, c, weight)
    rows, (dtasks, blocks, across), dchunk, dtile = _tasks(x, taps=len(taps))
    dparts = table.new_empty(dtasks, *taps.shape)
    rows, grid, chunk, tile = _tasks(x)
    parts = NO_JOIN if bn is None else join(x, grid[0], channels, grid[1])
    before = blocks * (1 + GROUPS.value)  # tickets that `join` has taken
    dtickets = _triton.tickets(x.device, before + blocks * across)[before:]
    tile |= {"BLOCK_T": dtile["BLOCK_T"], "BLOCK_D": dtile["BLOCK_M"]}
    depthwise_conv_bwd_kernel[(dtasks * across + grid[0], blocks)](
        *(g, x, bn, taps, du, table, dweight, share(count), dparts, dtickets, dtasks, dchunk, *parts),
        **sizes | tile | dict(M=rows, CHUNK=chunk, ACT=act),
    )
    return dweight, table


def _behind(dy: Tensor, y: Tensor | None, c: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(g = c0 dy + c1 y + c2, or dy, the weight as taps [k^2, C])"""
    if c is None:
        return dy, weight.flatten(1).t().contiguous()
    weight, g = weight.contiguous(), torch.empty_like(dy)
    taps = weight.new_empty(weight[0].numel(), len(weight))
    channels = len(weight)
    block_c = _triton.power_of_2(channels, 64)
    sizes = dict(TAPS=weight.shape[-1], WIDE=_triton.wide(dy), BLOCK_M=2048 // block_c, BLOCK_C=block_c)
    rows = dy.numel() // channels
    grid = triton.cdiv(rows, sizes["BLOCK_M"]), triton.cdiv(channels, block_c)
    depthwise_conv_g_kernel[grid](dy, y, c, g, weight, taps, rows, channels, **sizes)
    return g, taps


def _activated(x: Tensor, bn: Tensor | None, act: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x as the convolution reads it, the weight as taps [k^2, C])"""
    taps = weight.flatten(1).t()
    if bn is None:
        return x, taps.contiguous()
    if taps.is_contiguous():  # as a folded model keeps them
        return bn_act.bn_act_fwd(x, bn, act), taps
    return bn_act.activated(x, bn, act, weight)


def _sizes(x: Tensor, weight: Tensor, stride: int, dilation: int, upsample: int) -> dict[str, int]:
    _, channels, height, width = x.shape
    taps = weight.shape[-1] if weight.dim() else 0
    if weight.shape != (channels, 1, taps, taps) or taps % 2 == 0:
        raise RuntimeError(f"weight has shape {tuple(weight.shape)}; expected [{channels}, 1, k, k] with k odd")
    out = ((n * upsample - 1) // stride + 1 for n in (height, width))
    # further apart than the image, all taps but the middle one lie outside
    dilation = min(dilation, max(height * upsample, width * upsample, 1))
    names = ("C", "H", "W", "OUT_H", "OUT_W", "DILATION", "TAPS", "STRIDE", "UP", "UNIT")
    return dict(
        zip(names, (channels, height, width, *out, dilation, taps, stride, upsample, _triton.unit(channels)), strict=True)
    )


def _wide(*images: Tensor) -> bool:
    return any(_triton.wide(t) for t in images)


def _tasks(t: Tensor, taps: int = 0):
    """(rows, grid of tasks, CHUNK, sizes of a tile) of a pass over t, or over t and its taps: about 1,000 programs."""
    channels, least = t.shape[1], 2048
    rows, block_c, across, tile = t.numel() // channels, _triton.power_of_2(channels, 64), 1, {}
    if taps:
        tile["BLOCK_T"] = _triton.power_of_2(taps, 8)
        least, across = 512, triton.cdiv(taps, tile["BLOCK_T"])
    tile |= {"BLOCK_M": least // block_c, "BLOCK_C": block_c}
    blocks = triton.cdiv(channels, block_c)
    count, chunk = _triton.tasks(rows, tile["BLOCK_M"], 1024 // (blocks * across))
    return rows, (count, blocks, across) if taps else (count, blocks), chunk, tile
