"""The InceptionV3 network that FID features come from, up to its 2048 pooled features.

InceptionV3 is Szegedy et al. 2016 (arXiv 1512.00567); layers carry the names that PyTorch files of it use. The weights of FID
(Heusel et al. 2017) are TensorFlow's of 2015-12-05, whose network differs in three places: average pools leave the padding
out of their mean, the last block has a max pool instead, and inputs run from -1 to 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = tuple  # (name, channels, kernel, stride)
_AVG, _MAX = "avg", "max"  # 3x3 pools at stride 1


def _block_a(pool: int) -> list[list]:
    return [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
        [_AVG, ("branch_pool", pool, 1, 1)],
    ]


def _block_c(mid: int) -> list[list]:
    return [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", mid, 1, 1), ("branch7x7_2", mid, (1, 7), 1), ("branch7x7_3", 192, (7, 1), 1)],
        [("branch7x7dbl_1", mid, 1, 1), ("branch7x7dbl_2", mid, (7, 1), 1), ("branch7x7dbl_3", mid, (1, 7), 1),
         ("branch7x7dbl_4", mid, (7, 1), 1), ("branch7x7dbl_5", 192, (1, 7), 1)],
        [_AVG, ("branch_pool", 192, 1, 1)],
    ]  # fmt: skip


def _block_e(pool: str) -> list[list]:
    return [
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), [("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1)]],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1),
         [("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)]],
        [pool, ("branch_pool", 192, 1, 1)],
    ]  # fmt: skip


_STRIDED = "strided"  # a 3x3 max pool at stride 2
_STEM = [("Conv2d_1a_3x3", 32, 3, 2, 0), ("Conv2d_2a_3x3", 32, 3, 1, 0), ("Conv2d_2b_3x3", 64, 3, 1, 1), _STRIDED,
         ("Conv2d_3b_1x1", 80, 1, 1, 0), ("Conv2d_4a_3x3", 192, 3, 1, 0), _STRIDED]  # fmt: skip
_BLOCKS: dict[str, list[list]] = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
        [_STRIDED],
    ],
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160), "Mixed_6e": _block_c(192),
    "Mixed_7a": [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [("branch7x7x3_1", 192, 1, 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
         ("branch7x7x3_4", 192, 3, 2)],
        [_STRIDED],
    ],
    "Mixed_7b": _block_e(_AVG), "Mixed_7c": _block_e(_MAX),
}  # fmt: skip
"""Branches of a block, whose outputs are concatenated; a list within a branch is a fork into several layers."""


class ConvBNReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple, stride: int, padding: int | tuple) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _pool(kind: str, x: Tensor) -> Tensor:
    if kind == _AVG:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    return F.max_pool2d(x, 3, 1, 1) if kind == _MAX else F.max_pool2d(x, 3, 2)


class Block(nn.Module):
    def __init__(self, in_channels: int, branches: list[list]) -> None:
        super().__init__()
        self.branches, self.out_channels = branches, 0
        for branch in branches:
            width = in_channels
            for step in branch:
                fork = step if isinstance(step, list) else [step] if isinstance(step, tuple) else []
                for name, channels, kernel, stride in fork:
                    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
                    padding = tuple(k // 2 for k in sides) if stride == 1 else 0
                    setattr(self, name, ConvBNReLU(width, channels, kernel, stride, padding))
                width = sum(layer[1] for layer in fork) if fork else width
            self.out_channels += width

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for branch in self.branches:
            h = x
            for step in branch:
                if isinstance(step, str):
                    h = _pool(step, h)
                elif isinstance(step, list):
                    h = torch.cat([getattr(self, layer[0])(h) for layer in step], 1)
                else:
                    h = getattr(self, step[0])(h)
            out.append(h)
        return torch.cat(out, 1)


class Inception(nn.Module):
    """Images [B, 3, H, W] in [0, 1], of any size, to features [B, 2048]; inputs are resized to 299x299, bilinear."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for layer in _STEM:
            if isinstance(layer, tuple):
                name, channels, kernel, stride, padding = layer
                setattr(self, name, ConvBNReLU(width, channels, kernel, stride, padding))
                width = channels
        for name, branches in _BLOCKS.items():
            block = Block(width, branches)
            setattr(self, name, block)
            width = block.out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1
        for layer in _STEM:
            h = _pool(layer, h) if isinstance(layer, str) else getattr(self, layer[0])(h)
        for name in _BLOCKS:
            h = getattr(self, name)(h)
        return h.mean((2, 3))
