"""What se_residual's launchers share: sizes, and how sums per image are cut into tasks."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton


def sizes_of(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def block_of(x: Tensor) -> int:
    return _triton.power_of_2(x.shape[1], 64 if x.shape[2] * x.shape[3] > 16 else 128)


def before(bn: Tensor | None, channels: int) -> tuple[Tensor | None, bool]:
    """What stands before the op, and whether that is a bias [C] instead of a normalisation [5, C]."""
    if bn is not None and bn.dim() == 1:
        return _triton.floats("bias", bn, channels), True
    return _triton.floats("coefficients", bn, 5, channels), False


def sums(x: Tensor, kinds: int, hidden: int, bias: bool) -> tuple[tuple[int, int], Tensor, Tensor | None, dict[str, int]]:
    """(grid, parts [N, tasks, kinds, C], tickets of images, sizes) of a kernel with `store_parts`: about 1,000 programs, where
    there are that many tiles. Of the two linear layers' weights, 2048 values are read at a time."""
    images, channels, pixels = sizes_of(x)
    block_c, block_h = block_of(x), _triton.power_of_2(hidden, 1 << 16)
    block_m, across = 2048 // block_c, triton.cdiv(channels, block_c)
    count, chunk = _triton.tasks(pixels, block_m, 1024 // (images * across))
    sizes = {"CHUNK": chunk, "TASKS": count, "BIAS": bias, "WIDE": _triton.wide(x), "BLOCK_M": block_m, "BLOCK_C": block_c}
    sizes |= {"BLOCK_H": block_h, "BLOCK_W": _triton.power_of_2(channels, max(2048 // block_h, 16))}
    parts = x.new_empty(images, count, kinds, channels, dtype=torch.float32)
    return (images * count, across), parts, _triton.tickets(x.device, images) if hidden else None, sizes
