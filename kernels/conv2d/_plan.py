"""Tiles, programs and scratch of conv2d's kernels on a GPU: functions of the sizes alone, for they decide the bits of sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._join import GROUPS
from nvae_fast.kernels.conv2d._device import PIXELS
from nvae_fast.kernels.conv2d.ops import TILE

PROGRAMS = 128  # that a GPU should get: about one for each of its multiprocessors
SHARES = 8  # of a tile's sum over channels at most
TASKS = 16  # of a tile of the weight at most, where there is a smaller tile: the last ones read what all have
# By size of a stored value: tiles [pixels, columns], the channels summed over at a time, warps and stages; the largest first.
TILES = {
    2: ((128, 128, 64, 8, 3), (128, 64, 64, 8, 3), (64, 64, 64, 4, 4)),
    4: ((64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
}
# The same of tiles of the weight [columns of y, of x] and the rows summed over at a time.
DWEIGHT = {2: ((128, 128, 64, 8, 3), (64, 64, 64, 4, 5)), 4: ((64, 64, 16, 8, 3),)}


class Plan(NamedTuple):
    """Tiles of a product over the nine taps; the maps of its programs, the shares of their sums, and tickets for these."""

    block_m: int
    block_n: int
    block_k: int
    programs: int
    scratch: tuple[Tensor | None, Tensor | None, Tensor | None]
    options: dict[str, int]


def plan_taps(x: Tensor, columns: int, depth: int, dilation: int, mapped: bool) -> Plan:
    """The largest tile of which there are enough to fill a GPU, or would be with up to SHARES programs a tile, each of which
    sums over some of the `depth` channels."""
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    for tile in TILES[x.element_size()]:
        block_m, *most = tile[:3]
        if rows % block_m == 0:
            block_n, block_k = (max(_triton.power_of_2(n, m), 16) for n, m in zip((columns, depth), most, strict=True))
            across, blocks = triton.cdiv(columns, block_n), max(triton.cdiv(depth, block_k), 1)
            tiles = rows // block_m * across
            each = triton.cdiv(blocks, min(triton.cdiv(PROGRAMS, tiles), blocks, SHARES))
            shares = triton.cdiv(blocks, each)
            if tiles * shares >= PROGRAMS:
                break
    tile_w = min(block_m // TILE, 2 * TILE if x.shape[3] % (2 * TILE) == 0 else TILE)
    area = block_m // (TILE * tile_w) * (TILE + 2 * dilation) * (tile_w + 2 * dilation)
    space, deep = triton.cdiv(area, PIXELS.value) * PIXELS.value, each * block_k
    scratch = (
        x.new_empty(tiles * shares, space, deep) if mapped else None,
        x.new_empty(tiles * shares, block_m, block_n, dtype=torch.float32) if shares > 1 else None,
        _triton.tickets(x.device, across * (1 + GROUPS.value) + tiles) if shares > 1 else None,
    )
    options = dict(SHARES=shares, DEPTH=deep, SPACE=space, TILE_W=tile_w, BLOCK_M=block_m)
    options |= dict(num_warps=tile[3], num_stages=tile[4])
    return Plan(block_m, block_n, block_k, tiles * shares, scratch, options)


def plan_weight(a: Tensor, rows: int, columns: int, depth: int) -> tuple[int, int, int, dict[str, int]]:
    """(tiles of the weight's gradient [columns, 9, depth], tasks, rows of a task, options)"""
    count = lambda t: 9 * triton.cdiv(columns, t[0]) * triton.cdiv(depth, t[1])  # noqa: E731
    table = DWEIGHT[a.element_size()]
    enough = (t for t in table if count(t) * TASKS >= PROGRAMS and 2 * columns > t[0] and 2 * depth > t[1])
    *most, block_m, warps, stages = tile = next(enough, table[-1])
    block_n, block_k = (max(_triton.power_of_2(n, m), 16) for n, m in zip((columns, depth), most, strict=True))
    tasks, chunk = _triton.tasks(rows, 4 * block_m, PROGRAMS // count(tile))
    options = dict(BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, num_stages=stages)
    return count(tile), tasks, chunk, options


def rounded(channels: int) -> int:
    """What a row of an image for the next kernel has: 16 bytes are read at a time, and no row needs a mask."""
    return triton.cdiv(channels, 16) * 16
