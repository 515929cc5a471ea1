"""WebDataset shards (tar files), read from front to back, from disk or over HTTP.

Every file of a shard that is named like an image is an image; other files are passed over. With all counts known (INDEX, see
shards.py) or `images_per_epoch` given, this is guaranteed:

- Training, epoch e: the shards are permuted by (seed, e) and dealt to the ranks in turn. A rank reads its shards one after the
  other, from the front again if they end before the epoch does, and shuffles within consecutive windows of `window` images.
  All ranks have the same number of batches, images_per_epoch // (batch_size * world). So a rank with fewer images than its
  share repeats some in an epoch, and one with more leaves some out: with shards of equal size, and as many for each rank,
  only the incomplete last batch is lost. The joined batches of W processes are not those of one process; all else is.
- Evaluation: every image once, in the order of the shards, whole shards dealt to the ranks in turn: a rank may have none.
- Restart: `set_epoch(e, t)` gives the batches from t on, bit for bit, for the same shards, seed, batch size, world and
  window. Shards before that place are not opened if their counts are known, else they are read through; within the window
  and the shard images are passed over.
- Nothing depends on the number of workers: they decode; one more thread reads, at most one window ahead (so up to three
  windows of encoded images are in memory).
- An image's random numbers are those of (seed, epoch, shard number * 2^32 + place in the shard).
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar, cast

import numpy as np

from ..errors import InputError
from . import rng, shards
from .base import ImageSource, Request, Rows
from .corrupt import Corrupt, CorruptImage
from .decode import decode, head
from .tar import ERRORS, content, image_members

T = TypeVar("T")


class Item(NamedTuple):
    """An image of a shard: its index, its name for messages, the bytes of its file (None: too many)."""

    index: int
    label: str
    content: bytes | None


def read_shards(request: Request) -> ImageSource:
    """The images of WebDataset shards: named by braces or a glob, or the .tar files in a folder."""
    if not request.shards:
        found = sorted(str(p) for p in request.path.rglob("*.tar")) if request.path.is_dir() else [str(request.path)]
        if not found:
            raise InputError(f"no .tar files in {request.path}: expected WebDataset shards")
        request = replace(request, shards=tuple(found))
    if request.window < 1:
        raise InputError(f"--shuffle-window is {request.window}, expected at least 1 image")
    mine = shards.split_shards(request)
    counts = shards.counts(mine)
    if request.split == "valid":
        counts = [shards.count(s) if n is None else n for s, n in zip(mine, counts, strict=True)]
    return StreamSource(request, mine, counts)


class StreamSource(ImageSource):
    """The images of some shards; `len` is the number of images in an epoch."""

    def __init__(self, request: Request, names: Sequence[str], counts: Sequence[int | None]):
        self._names, self._counts, self._window = names, counts, request.window
        self._transform, self.corrupt = request.transform, Corrupt(request.max_corrupt)
        self.random_crop = request.transform.random_crop
        first, label = self._find_first()
        self._only_grey = request.channels is None and head(partial(io.BytesIO, first), label)[0]
        channels = request.channels or (1 if self._only_grey else 3)
        self._first = decode(partial(io.BytesIO, first), label, channels), label
        asked = request.images_per_epoch if request.split == "train" else None
        super().__init__(
            request.name,
            asked or sum(n or 0 for n in counts),
            (*(request.transform.size or self._first[0].shape[:2]), channels),
        )

        self._asked = asked is not None

    def __len__(self) -> int:
        if not self._asked and None in self._counts:
            raise InputError(
                f"the number of images in {self._names[list(self._counts).index(None)]} is not known: give "
                f"--images-per-epoch, or serve beside the shards the {shards.INDEX} that training on a local copy writes"
            )
        return self._count

    def _find_first(self) -> tuple[bytes, str]:
        """The first image that can be read: it says what the others are like, and stands in for unreadable ones."""
        for item in (item for s in range(len(self._names)) for item in self._shard(s, 0)):
            try:
                if item.content is not None:
                    decode(partial(io.BytesIO, item.content), item.label, 3)
                    return item.content, item.label
            except CorruptImage as error:
                self.corrupt.add(item.label, error)
        raise InputError(f"no readable image in {self._names[0]} and {len(self._names) - 1} more shards")

    def __getitem__(self, index: int) -> np.ndarray:
        raise InputError(f"'{self.name}' is a stream: its images cannot be asked for by number; make a loader")

    def readable(self, item: Item, /, u: np.ndarray | None = None) -> np.ndarray | None:
        if item.label in self.corrupt:
            return None
        try:
            if item.content is None:
                raise CorruptImage(f"{item.label} has more bytes than any image needs: take it out")
            opened = partial(io.BytesIO, item.content)
            if self._only_grey and not head(opened, item.label)[0]:
                raise InputError(
                    f"{item.label} has colours, but {self._first[1]}, the first image, has none: "
                    "make them alike, or put an image with colours first"
                )
            return self.fitted(decode(opened, item.label, self.channels), item.label, self._transform, u)
        except CorruptImage as error:
            self.corrupt.add(item.label, error)
            return None

    def stored(self, item: Item) -> bytes:
        assert item.content is not None
        return item.content

    def chunks(self, size: int) -> Iterator[Sequence[Item]]:
        every = (item for s in range(len(self._names)) for item in self._shard(s, 0))
        while chunk := list(islice(every, size)):
            yield chunk

    def rows_of(self, items: Sequence[Item], u: np.ndarray | None = None, *, replace: bool = False) -> Rows:
        """As `batch`; the first image of all takes the place of one that cannot be read."""

        def first(row: int) -> np.ndarray:
            return self.fitted(*self._first, self._transform, None if u is None else u[row])

        images = [self.readable(item, None if u is None else u[row]) for row, item in enumerate(items)]
        return self.rows(images, first if replace else None)

    def tasks(
        self, batch_size: int, *, train: bool, seed: int, epoch: int, start: int, batches: int, rank: int, world: int,
        limit: int | None,
    ) -> Iterator[tuple[np.ndarray, Callable[..., Rows]]]:  # fmt: skip
        """(indices, reader of the images) of the batches from `start` to `batches`."""
        if train:
            order = rng.permutation(len(self._names), seed, epoch, rng.SHARDS)[rank::world].tolist()
            blocks: Iterator[list[Item]] = self._blocks(order, seed, epoch, start * batch_size, batches * batch_size)
            skip = start * batch_size % self._window
        else:
            blocks, skip = self._in_order(rank, world, limit), start * batch_size
        items = (item for block in ahead(blocks, 1) for item in block)
        items = islice(items, skip, None)
        for _ in range(start, batches):
            some = list(islice(items, batch_size))
            yield np.array([item.index for item in some], np.int64), partial(self.rows_of, some)

    def share(self, rank: int, world: int, limit: int | None) -> int:
        """Images of a rank in an evaluation."""
        return sum(self._allowed(limit)[rank::world])

    def check_world(self, world: int) -> None:
        if len(self._names) < world:
            raise InputError(f"'{self.name}' has {len(self._names)} training shards, {world} processes need at least as many")

    def _allowed(self, limit: int | None) -> list[int]:
        """Images of every shard, only the first `limit` of all."""
        out, left = [], limit
        for name, n in zip(self._names, self._counts, strict=True):
            if n is None:
                raise InputError(f"the number of images in {name} is not known: an evaluation needs {shards.INDEX} beside it")
            out.append(n if left is None else min(n, left))
            left = None if left is None else left - out[-1]
        return out

    def _shard(self, number: int, skip: int) -> Iterator[Item]:
        """The images of a shard, but for the first `skip`."""
        name = self._names[number]
        place = -1
        try:
            with shards.open_shard(name) as stream:
                for place, (info, archive) in enumerate(image_members(stream, "r|", name)):  # noqa: B007
                    if place == self._counts[number]:
                        raise self._miscounted(number)
                    if place >= skip:
                        label = f"{name}:{info.name}"
                        try:
                            found: bytes | None = content(info, archive, label)
                        except CorruptImage:
                            found = None
                        yield Item(number << 32 | place, label, found)
        except InputError:
            raise
        except ERRORS as error:
            raise shards.unreadable(name, error) from None
        if self._counts[number] not in (None, place + 1):
            raise self._miscounted(number)

    def _miscounted(self, number: int) -> InputError:
        return InputError(
            f"{self._names[number]} does not have the {self._counts[number]} images that {shards.INDEX} says: remove that "
            "file, it is made again from local shards"
        )

    def _in_order(self, rank: int, world: int, limit: int | None) -> Iterator[list[Item]]:
        """The rank's images of an evaluation in pieces."""
        allowed = self._allowed(limit)
        for number in range(rank, len(self._names), world):
            items = islice(self._shard(number, 0), allowed[number]) if limit is not None else self._shard(number, 0)
            while piece := list(islice(items, min(self._window, 64))):
                yield piece

    def _endless(self, order: Sequence[int], skip: int) -> Iterator[Item]:
        """The images of the shards, again and again, but for the first `skip`."""
        while True:
            some = False
            for number in order:
                n = self._counts[number]
                if n is not None and n <= skip:
                    skip, some = skip - n, some or n > 0
                    continue
                for item in self._shard(number, 0 if n is None else skip):
                    some = True
                    if n is None and skip:
                        skip -= 1
                    else:
                        yield item
                skip = skip if n is None else 0
            if not some:
                raise InputError(f"no images in the shards of this process ({self._names[order[0]]} ...)")

    def _blocks(self, order: Sequence[int], seed: int, epoch: int, first: int, end: int) -> Iterator[list[Item]]:
        """Shuffled windows from the one that holds image `first` on, up to image `end`."""
        begin = first // self._window * self._window
        items = self._endless(order, begin)
        for at in range(begin, end, self._window):
            block = list(islice(items, min(self._window, end - at)))
            keys = rng.keys(seed, epoch, rng.WINDOW, np.arange(at, at + len(block)))
            yield [block[i] for i in np.argsort(keys, kind="stable")]


def ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """The same items, drawn by a thread that is up to `depth` of them ahead; its failure is raised here."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
    stop = threading.Event()

    def put(item: T | None, error: BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put((item, error), timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def draw() -> None:
        try:
            for item in items:
                if not put(item, None):
                    return
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=draw, name="nvae-fast-reader", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield cast(T, item)  # which comes without an error
    finally:
        stop.set()
        thread.join(5)  # one that waits for a server ends with the process
