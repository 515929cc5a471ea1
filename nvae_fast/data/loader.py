"""`make_loader`: from a sequence of images to batches, reproducible to the bit wherever a run is taken up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from ..errors import InputError
from . import rng
from .base import ImageSource, Rows, thread_count
from .device import Raw, upload
from .stream import StreamSource

MAX_WORKERS = 1024
T = TypeVar("T")
Task = tuple[np.ndarray, Callable[..., Rows]]


class Loader:
    """Batches x, float32 [B, C, H + 2p, W + 2p], contiguous: x = pixel / 255, padded with zeros.

    `set_epoch` chooses the epoch and the first batch; `len` counts the batches of a whole epoch on this rank.

    Every random choice is a function of (seed, epoch, image index), in validation of (seed, image index): it does not
    depend on batch size, workers, rank or on what was read before.

    Args:
        batch_size: images per rank and batch.
        train: shuffled, an incomplete last batch dropped. Otherwise in order, nothing dropped or counted twice.
        padding: pixels of zeros on each side, added last.
        flip: mirror each training image left-right with probability 1/2.
        binarize: x = 1 with probability pixel/255, else 0; drawn anew in each training epoch, fixed in validation.
        workers: decoding threads of a source that is not in memory; 0: the smaller of 4 and the processors there are.
        rank, world: this process and how many there are. Step t joined over the processes, in the order of their ranks, is
            batch t of one process with batches of world * batch_size, bit for bit. The last batch of an evaluation is
            shared out as evenly as it can be: a rank may have one batch less than another, or none.
        limit: only the first `limit` images of the source exist.
        device: where the batches are to be. On a GPU they are channels-last and come one ahead, with the very numbers of a
            CPU: bytes are sent through pinned memory, everything else is done there. Not yet run on a GPU.

    Raises:
        InputError: fewer training images than one batch on every rank; numbers out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        train: bool,
        seed: int,
        padding: int = 0,
        flip: bool = False,
        binarize: bool = False,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
        device: torch.device | None = None,
    ):
        for value, name, least in ((batch_size, "--batch-size", 1), (padding, "padding", 0), (workers, "workers", 0)):
            if value < least:
                raise InputError(f"{name} is {value}, expected at least {least}")
        if workers > MAX_WORKERS:
            raise InputError(f"workers is {workers}, expected at most {MAX_WORKERS}")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} of {world} processes, expected 0 to {world - 1}")
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}, expected at least 1 image")
        self.source, self.batch_size, self.train = source, batch_size, train
        self._seed, self._padding, self._workers = seed, padding, workers
        self._flip, self._binarize = flip and train, binarize
        self._rank, self._world = rank, world
        self._count = len(source) if limit is None else min(limit, len(source))
        self._limit, self._device = limit, device
        self._epoch = self._start = 0
        share = batch_size * world
        if train:
            if isinstance(source, StreamSource):
                source.check_world(world)
            self._batches = self._count // share
            if not self._batches:
                where = f" on each of {world} processes" if world > 1 else ""
                fits = self._count // world
                cure = f"use --batch-size {fits} or less" if fits else "use fewer processes and a smaller --batch-size"
                raise InputError(f"{self._count} training images, expected at least a batch of {batch_size}{where}: {cure}")
        elif isinstance(source, StreamSource):
            self._batches = -(-source.share(rank, world, limit) // batch_size)
        else:
            whole, rest = divmod(self._count, share)
            self._batches = whole + (rest > rank)  # np.array_split gives the first ranks the larger parts

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self._batches

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """What the next iterations give: an epoch, from a batch on (those before it are neither read nor decoded)."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch is {start_batch}, expected 0 to {len(self)}")
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[torch.Tensor]:
        # the epoch is read here, not at the first batch: set_epoch during an iteration is for the next one
        key_epoch = self._epoch if self.train else -1
        return self._run(self._tasks(key_epoch, self._start), key_epoch)

    def _tasks(self, epoch: int, start: int) -> Iterator[Task]:
        """(indices, reader) of every batch of this rank."""
        if isinstance(self.source, StreamSource):
            yield from self.source.tasks(
                self.batch_size, train=self.train, seed=self._seed, epoch=epoch, start=start, batches=len(self),
                rank=self._rank, world=self._world, limit=self._limit,
            )  # fmt: skip
            return
        order = rng.permutation(self._count, self._seed, epoch, rng.SHUFFLE) if self.train else np.arange(self._count)
        share = self.batch_size * self._world
        for i in range(start, len(self)):
            mine = np.array_split(order[i * share : (i + 1) * share], self._world)[self._rank]
            yield mine, partial(self.source.batch, mine)

    def _run(self, tasks: Iterator[Task], epoch: int) -> Iterator[torch.Tensor]:
        if self._device is not None and self._device.type != "cpu":
            raws = (raw for raw in self._worked(tasks, partial(self._raw, epoch=epoch)) if len(raw.images))
            yield from upload(raws, self._device, self._padding)
            return
        for x in self._worked(tasks, partial(self._batch, epoch=epoch)):
            if len(x):  # no image of a batch of an evaluation may be readable
                yield torch.from_numpy(x)

    def _worked(self, tasks: Iterator[Task], work: Callable[[Task], T]) -> Iterator[T]:
        """work(task) for all tasks, in order; on threads where images have to be decoded."""
        if self.source.images is not None:
            yield from map(work, tasks)
            return
        # Threads, not processes: Pillow decodes outside Python's lock; a fork after OpenMP's first threads can hang.
        workers = thread_count(self._workers)
        pool = ThreadPoolExecutor(workers, thread_name_prefix="nvae-fast-data")
        pending: deque = deque()
        try:
            for task in tasks:
                pending.append(pool.submit(work, task))
                if len(pending) > workers:  # one batch per thread in work, one ready
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also when the consumer stops early or a file is bad
            pool.shutdown(cancel_futures=True)

    def _raw(self, task: Task, epoch: int) -> Raw:
        """The images of a batch, and what is random about them. Numpy only, as `_batch`."""
        index, read = task

        def keys(stream: int) -> np.ndarray:
            return rng.keys(self._seed, epoch, stream, index)

        crops = rng.uniform(keys(rng.CROP), 2) if self.source.random_crop and self.train else None
        images, kept = read(crops, replace=self.train)
        index = index[kept]
        mirrored = rng.uniform(keys(rng.FLIP), 1)[:, 0] < 0.5 if self._flip else None
        return Raw(images, mirrored, keys(rng.BINARIZE) if self._binarize else None)

    def _batch(self, task: Task, epoch: int) -> np.ndarray:
        """x of a batch: device.finish in numpy, for in worker threads torch would start OpenMP threads of its own for each."""
        images, mirrored, keys = self._raw(task, epoch)
        if mirrored is not None:
            images[mirrored] = images[mirrored, :, ::-1]
        count, height, width, channels = images.shape
        pad = self._padding
        out = np.zeros((count, channels, height + 2 * pad, width + 2 * pad), np.float32)
        inner = out[:, :, pad : pad + height, pad : pad + width]
        np.divide(images.transpose(0, 3, 1, 2), 255, out=inner, dtype=np.float32)
        if keys is not None:
            u = rng.uniform(keys, height * width * channels).reshape(images.shape)
            np.less(u.transpose(0, 3, 1, 2), inner, out=inner)
        return out


make_loader = Loader  # reads better where it is called
