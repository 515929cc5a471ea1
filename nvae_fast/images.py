"""Grids of images as PNG files, and sets of images as arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_write


def enlargement(height: int, width: int, min_side: int = 64) -> int:
    """The least whole factor by which both sides reach `min_side` pixels."""
    return max(1, -(-min_side // min(height, width)))


def grid(images: Tensor, columns: int, *, gap: int = 2, min_side: int = 64) -> Image.Image:
    """Images [N, C, H, W] in [0, 1] in rows of `columns`, on grey, enlarged by a whole factor to at least `min_side` pixels.

    One channel is shown grey, three in colour; of any other number only the first.
    """
    if images.shape[1] not in (1, 3):
        images = images[:, :1]
    n, _, height, width = images.shape
    factor = enlargement(height, width, min_side)
    levels = to_levels(images)
    pixels = np.broadcast_to(levels, (*levels.shape[:3], 3))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor, width * factor
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 96, np.uint8)
    for i in range(n):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = pixels[i]
    return Image.fromarray(canvas)


def to_levels(images: Tensor) -> np.ndarray:
    """Images [N, C, H, W] in [0, 1] as uint8 [N, H, W, C], rounded to the nearest level; NaN is 0."""
    return (
        (images.detach().float().cpu().nan_to_num(0).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    )


def save_npz(images: Tensor, path: str | Path) -> None:
    """Write `to_levels(images)` as the array `images` of a compressed .npz file, which `--data` reads."""
    levels = to_levels(images)
    atomic_write(path, lambda file: np.savez_compressed(file, images=levels))


def save_grid(images: Tensor, path: str | Path, columns: int) -> None:
    """Write `grid(images, columns)` as a PNG; the file appears whole or not at all."""
    picture = grid(images, columns)
    atomic_write(path, lambda file: picture.save(file, format="PNG"))


def side_by_side(originals: Tensor, reconstructions: Tensor, columns: int) -> Tensor:
    """Rows of originals, each followed by the row of their reconstructions: [2N, C, H, W] for a grid of `columns`."""
    blocks = []
    for start in range(0, len(originals), columns):
        rows = slice(start, start + columns)
        pad = columns - len(originals[rows])
        for images in (originals[rows], reconstructions[rows]):
            blocks += [images.cpu(), torch.zeros(pad, *images.shape[1:])]
    return torch.cat(blocks)
