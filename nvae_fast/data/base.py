"""What a reader of images gets (`Request`) and gives (`ImageSource`)."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch

from ..errors import InputError
from .corrupt import Corrupt, CorruptImage
from .rng import SPLIT, permutation
from .transforms import Transform, size_text

T = TypeVar("T")
R = TypeVar("R")

MEMORY_LIMIT = 256 * 2**20
"""A split that takes at most this many bytes when decoded is decoded once and kept: small sets of all kinds take one
code path, nothing is decoded in the training loop, and every bad file is found before the first step."""


@dataclass(frozen=True)
class Request:
    """Which images to read, and how. `channels` is None where the data decide; `size` in `transform` likewise.

    `max_corrupt` unreadable images are passed over; `keep_small`: a small set is decoded at once and kept; `shards`,
    `images_per_epoch` and `window` are those of a stream (stream.py).
    """

    path: Path
    name: str
    split: str
    seed: int
    valid_fraction: float
    transform: Transform = field(default_factory=Transform)
    channels: int | None = None
    max_corrupt: int = 0
    shards: tuple[str, ...] = ()
    images_per_epoch: int | None = None
    window: int = 1000
    keep_small: bool = True


class Rows(NamedTuple):
    """Images of a batch: uint8 [B,H,W,C], a new array; and which of the rows asked for they are, int64 [B]."""

    images: np.ndarray
    kept: np.ndarray


class ImageSource(ABC):
    """uint8 images [H,W,C] of one size: a stream of them, or an IndexedSource.

    Attributes: name, channels, height, width; `images`, uint8 tensor [N,H,W,C] when they are in memory, else None;
    `random_crop`, whether an image wants two random numbers for its crop.
    """

    images: torch.Tensor | None = None
    random_crop = False

    def __init__(self, name: str, count: int, shape: tuple[int, int, int]):
        self.name = name
        self.height, self.width, self.channels = shape
        self._count = count

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def __getitem__(self, index: int) -> np.ndarray:
        """An image, where they can be asked for by number."""

    @abstractmethod
    def readable(self, item: Any, /) -> np.ndarray | None:
        """The image of an item of `chunks`, or None where it cannot be read."""

    @abstractmethod
    def chunks(self, size: int) -> Iterator[Sequence[Any]]:
        """What `readable` takes, for all images in order, in pieces."""

    def fitted(self, image: np.ndarray, name: str, transform: Transform, u: np.ndarray | None) -> np.ndarray:
        """The image in the size of this source."""
        image = transform(image, name, u)
        expected = (self.height, self.width, self.channels)
        if image.shape != expected:
            raise InputError(f"{name} is {size_text(image.shape)}, expected {size_text(expected)}: give --image-size")
        return image

    def rows(self, images: Sequence[np.ndarray | None], other: Callable[[int], np.ndarray] | None) -> Rows:
        """A batch of images, None where one cannot be read: left out, or replaced by other(row)."""
        kept = [row for row, image in enumerate(images) if image is not None or other is not None]
        out = np.empty((len(kept), self.height, self.width, self.channels), np.uint8)
        for place, row in enumerate(kept):
            image = images[row]
            out[place] = other(row) if image is None and other is not None else image
        return Rows(out, np.array(kept, np.int64))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self._count} images, {self.height}x{self.width}x{self.channels})"


class IndexedSource(ImageSource):
    """A sequence of images, in any order."""

    def __getitem__(self, index: int) -> np.ndarray:
        if not -self._count <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return self._one(index % self._count, None)

    @abstractmethod
    def _one(self, index: int, u: np.ndarray | None) -> np.ndarray:
        """uint8 [H,W,C] of one image; raises CorruptImage where it cannot be read."""

    def readable(self, index: int, /) -> np.ndarray | None:
        return self._one(index, None)

    def chunks(self, size: int) -> Iterator[Sequence[int]]:
        return (range(start, min(start + size, len(self))) for start in range(0, len(self), size))

    @abstractmethod
    def batch(self, index: np.ndarray, u: np.ndarray | None = None, *, replace: bool = False) -> Rows:
        """The images of these indices; u [B,2] places random crops. Safe to call from several threads.

        An image that cannot be read is left out, or with `replace` the next one that can be read takes its place.
        """


class MemorySource(IndexedSource):
    """Images that lie in memory: uint8 array [N,H,W,C]."""

    def __init__(self, name: str, images: np.ndarray):
        super().__init__(name, len(images), images.shape[1:])
        self._array = np.require(images, np.uint8, ["C", "W"])
        self.images = torch.from_numpy(self._array)

    def _one(self, index: int, u: np.ndarray | None) -> np.ndarray:
        return self._array[index].copy()

    def batch(self, index: np.ndarray, u: np.ndarray | None = None, *, replace: bool = False) -> Rows:
        return Rows(self._array[index], np.arange(len(index)))


class LazySource(IndexedSource):
    """Images decoded when they are asked for.

    Args:
        read: index -> uint8 [h,w,C]; raises CorruptImage.
        label: index -> the name for messages.
        corrupt: counts the unreadable images; None: none is allowed.
        stored: index -> the bytes of the image's file, where there is one.
    """

    def __init__(
        self,
        name: str,
        count: int,
        shape: tuple[int, int, int],
        read: Callable[[int], np.ndarray],
        label: Callable[[int], str],
        transform: Transform,
        corrupt: Corrupt | None = None,
        stored: Callable[[int], bytes] | None = None,
    ):
        super().__init__(name, count, shape)
        self._read, self._label, self._transform, self.stored = read, label, transform, stored
        self.random_crop = transform.random_crop
        self.corrupt = Corrupt(0) if corrupt is None else corrupt

    def _one(self, index: int, u: np.ndarray | None) -> np.ndarray:
        return self.fitted(self._read(index), self._label(index), self._transform, u)

    def readable(self, index: int, /, u: np.ndarray | None = None) -> np.ndarray | None:
        if self._label(index) in self.corrupt:
            return None
        try:
            return self._one(index, u)
        except CorruptImage as error:
            self.corrupt.add(self._label(index), error)
            return None

    def batch(self, index: np.ndarray, u: np.ndarray | None = None, *, replace: bool = False) -> Rows:
        def next_one(row: int) -> np.ndarray:
            others = ((int(index[row]) + i) % self._count for i in range(1, self._count))
            found = next((x for i in others if (x := self.readable(i, None if u is None else u[row])) is not None), None)
            if found is None:
                raise InputError(f"'{self.name}': none of the {self._count} images can be read")
            return found

        images = [self.readable(i, None if u is None else u[row]) for row, i in enumerate(index.tolist())]
        return self.rows(images, next_one if replace else None)

    def in_memory(self) -> MemorySource:
        """The same images, decoded now, without those that cannot be read."""
        images = [x for x in parallel(self.readable, range(len(self))) if x is not None]
        if not images:
            raise InputError(f"'{self.name}': none of the {self._count} images can be read")
        return MemorySource(self.name, np.stack(images))


def first_shape(
    count: int, read: Callable[[int], np.ndarray], label: Callable[[int], str], corrupt: Corrupt
) -> tuple[int, ...]:
    """The shape of the first image that can be read."""
    for i in range(count):
        try:
            return read(i).shape
        except CorruptImage as error:
            corrupt.add(label(i), error)
    raise InputError(f"{label(0)} and the {count - 1} images behind it cannot be read")


def keep_small(source: LazySource) -> ImageSource:
    """The source in memory if it fits MEMORY_LIMIT; not one with random crops, whose images differ in every epoch."""
    size = len(source) * source.height * source.width * source.channels
    return source if source.random_crop or size > MEMORY_LIMIT else source.in_memory()


def from_array(request: Request, images: np.ndarray) -> MemorySource:
    """uint8 [N,h,w,C] through the request's transform."""
    if len(images) == 0:
        raise InputError(f"{request.path}: no images in the {request.split} part")
    if request.transform != Transform():
        images = np.stack([request.transform(image, f"{request.path} image {i}") for i, image in enumerate(images)])
    return MemorySource(request.name, images)


def split_indices(request: Request, count: int) -> np.ndarray:
    """The part of 0..count-1 that is the request's split, ascending.

    A permutation drawn from `seed` is cut: its last round(count * valid_fraction) validate (at least one, never all).
    """
    if count < 2:
        raise InputError(f"{request.path}: {count} image(s), at least 2 are needed to split off validation images")
    order = permutation(count, request.seed, -1, SPLIT)
    cut = count - min(max(round(count * request.valid_fraction), 1), count - 1)
    return np.sort(order[:cut] if request.split == "train" else order[cut:])


def find_pair(names: Iterable[str]) -> tuple[str, str] | None:
    """The first (train, valid) pair of part names that is there."""
    there = set(names)
    pairs = [("train", "valid"), ("train", "validation"), ("train", "val"), ("train", "test"), ("x_train", "x_test")]
    return next((pair for pair in pairs if there.issuperset(pair)), None)


def thread_count(asked: int = 0) -> int:
    """Decoding threads: as asked, or for 0 the smaller of 4 and the processors this process may use."""
    if asked > 0:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, usable)


def parallel(work: Callable[[T], R], items: Sequence[T], chunk: int = 64) -> list[R]:
    """[work(item) for item in items] on threads (Pillow decodes outside Python's lock); raises the first failure."""
    pieces = [items[i : i + chunk] for i in range(0, len(items), chunk)]
    pool = ThreadPoolExecutor(thread_count())
    try:
        return [result for piece in pool.map(lambda piece: [work(item) for item in piece], pieces) for result in piece]
    finally:
        pool.shutdown(cancel_futures=True)


def one_line(error: BaseException) -> str:
    """The message of an error of somebody else's, on one short line; its class where there is no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def read_up_to(stream: IO[bytes], limit: int) -> bytes:
    """The next `limit` bytes, or what there is: stream.read(limit) may take memory for all of them first."""
    pieces: list[bytes] = []
    while limit > 0 and (piece := stream.read(min(limit, 2**20))):
        pieces.append(piece)
        limit -= len(piece)
    return b"".join(pieces)
