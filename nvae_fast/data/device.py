"""Batches for a GPU: bytes cross, flips, draws, floats and padding are made there, one batch ahead of the consumer.

Every number is the one that the CPU makes in loader.py, bit for bit: the same generator (rng.py) in int64 arithmetic, which
wraps around as uint64 does, and levels from a table instead of a division that a compiler may turn into a product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Raw(NamedTuple):
    """A batch before it is finished: uint8 [B,H,W,C], bool [B] (which are mirrored) and uint64 [B] (keys of the draws)."""

    images: np.ndarray
    mirrored: np.ndarray | None
    keys: np.ndarray | None


def _signed(n: int) -> int:
    return n - (1 << 64) if n >> 63 else n


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(keys: Tensor, count: int) -> Tensor:
    """float32 [B, count] in [0, 1) of int64 keys [B]: what rng.uniform gives."""
    steps = torch.arange(1, (count + 1) // 2 + 1, device=keys.device)
    z = keys[:, None] + steps * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shifted(z, 31)
    words = torch.stack(((z >> 8) & 0xFFFFFF, _shifted(z, 40)), dim=-1).flatten(1)[:, :count]
    return words.float() * 2.0**-24


def levels(device: torch.device) -> Tensor:
    """float32 [256]: k / 255 as numpy rounds it."""
    return torch.from_numpy(np.arange(256, dtype=np.float32) / np.float32(255)).to(device)


def finish(images: Tensor, mirrored: Tensor | None, keys: Tensor | None, table: Tensor, padding: int) -> Tensor:
    """x [B, C, H + 2p, W + 2p], channels-last, of uint8 images [B,H,W,C]; `keys` int64 [B] where x is to be drawn."""
    if mirrored is not None:
        images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
    x = table[images.int()]
    if keys is not None:
        x = (uniform(keys, images[0].numel()).view_as(x) < x).to(x.dtype)
    return torch.nn.functional.pad(x, (0, 0, padding, padding, padding, padding)).permute(0, 3, 1, 2)


def upload(batches: Iterator[Raw], device: torch.device, padding: int) -> Iterator[Tensor]:
    """The finished batches on the device. On a GPU they come through pinned memory, on a stream of their own, and while the
    consumer works on one the next is on its way."""
    table = levels(device)
    if device.type != "cuda":
        yield from (finish(*_sent(raw, device, False), table, padding) for raw in batches)
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # the table
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for raw in batches:
        with torch.cuda.stream(side):
            x = finish(*_sent(raw, device, True), table, padding)
            done = side.record_event()
        if waiting is not None:
            yield _handed_over(*waiting, device)
        waiting = x, done
    if waiting is not None:
        yield _handed_over(*waiting, device)


def _sent(raw: Raw, device: torch.device, pinned: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    def send(array: np.ndarray | None) -> Tensor | None:
        if array is None:
            return None
        host = torch.from_numpy(array)
        return (host.pin_memory() if pinned else host).to(device, non_blocking=True)

    images = send(raw.images)
    assert images is not None
    return images, send(raw.mirrored), send(None if raw.keys is None else raw.keys.view(np.int64))


def _handed_over(x: Tensor, done: torch.cuda.Event, device: torch.device) -> Tensor:
    consumer = torch.cuda.current_stream(device)
    consumer.wait_event(done)
    x.record_stream(consumer)  # its memory belongs to the stream that made it
    return x
