"""Runs every kernel on a library built with sanitizers: `python sanitized.py LIBRARY`. An access outside a tensor or outside
the shared memory that was asked for, a misaligned one, or an overflow ends the process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from emulated import VARIANTS, Library

# N, C, H, W, k, stride, dilation, upsample
SHAPES = [
    (2, 40, 17, 3, 5, 1, 1, 1), (1, 72, 4, 9, 5, 1, 1, 1), (5, 8, 7, 8, 5, 1, 1, 1), (2, 24, 9, 2, 3, 1, 1, 1),
    (1, 7, 5, 4, 5, 2, 1, 1), (1, 34, 3, 4, 3, 1, 2, 1), (1, 6, 3, 2, 5, 1, 1, 2),
]  # fmt: skip


def following(c: int) -> tuple:
    """A normalisation that follows, its running statistics of two types."""
    running = torch.zeros(c, dtype=torch.float64), torch.ones(c, dtype=torch.float16)
    return [1e-5, 0.1, 1.0], torch.rand(c), torch.rand(c), torch.rand(c), *running, torch.tensor(3)


def run(library: Library, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    n, c, h, w, k, stride, dilation, up = shape
    dense = lambda *size: torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)  # noqa: E731
    x, weight, bn = dense(n, c, h, w), torch.randn(c, 1, k, k).to(dtype), torch.rand(5, c)
    if dtype == torch.float16:
        x[0, 0, 0, 0] = float("inf")  # also where the tensor cores are left aside
    for variant in VARIANTS.values():
        for first, act in ((bn, 1), (None, 0)):
            try:
                y, _ = library.forward(x, first, act, weight, stride, dilation, up, True, *following(c), variant=variant)
                for behind in ((y, torch.rand(3, c)), (None, None)):
                    library.backward(dense(*y.shape), *behind, x, first, act, weight, stride, dilation, up, 9.0, variant)
            except RuntimeError as error:  # a kernel that does not take this shape
                assert variant and str(error) == "cuda error 1", error


if __name__ == "__main__":
    library = Library(Path(sys.argv[1]))
    for shape in SHAPES:
        for dtype in (torch.float32, torch.float16):
            run(library, shape, dtype)
    print("clean:", *sorted(set(library.ran)))
