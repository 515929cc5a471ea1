"""LMDBs in the reference's layout, read lazily, never locked; and their writer.

Keys are 0, 1, ... in decimal ASCII (LSUN's own are whatever they are), values raw RGB or the bytes of image files; how many
there are is asked of the database. `prepare` adds DESCRIPTION, which says what the databases beside it hold.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .base import ImageSource, LazySource, Request, one_line
from .corrupt import Corrupt
from .decode import decode
from .lmdb_pages import fault

DESCRIPTION = "dataset.json"
STORES = ("train.lmdb", "validation.lmdb")


def raw_rgb(value: bytes, name: str) -> np.ndarray:
    """uint8 [s,s,3] of s*s*3 bytes."""
    side = isqrt(len(value) // 3)
    if not side or side * side * 3 != len(value):
        raise InputError(f"{name} has {len(value)} bytes, expected 3 s^2 of raw RGB: is it another dataset's file?")
    return np.frombuffer(value, np.uint8).reshape(side, side, 3)


def encoded(value: bytes, name: str) -> np.ndarray:
    """uint8 [h,w,3] of the bytes of an image file."""
    return decode(lambda: io.BytesIO(value), name, 3)


def _library() -> Any:
    try:
        import lmdb
    except ImportError:
        raise InputError("LMDBs need lmdb: pip install nvae_fast[data]") from None
    return lmdb


@cache  # the library refuses to open one file twice in a process
def _environment(path: Path) -> Any:
    lmdb = _library()
    file = path / "data.mdb" if path.is_dir() else path
    if file.is_file() and (found := fault(file)):
        raise InputError(f"{path} is damaged ({found}): copy or build it again")
    try:
        env = lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, max_spare_txns=16)
    except lmdb.Error as error:
        raise InputError(f"{path} is not a readable LMDB: {one_line(error)}") from None
    needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = os.path.getsize(file)
    if size < needed:  # a page beyond the end of a mapped file would kill the process
        env.close()
        raise InputError(f"{path} is cut off: it has {size} bytes of {needed}; copy or build it again")
    return env


def lmdb_reader(
    files: Sequence[str], value: Callable[[bytes, str], np.ndarray], *, numbered: bool = True
) -> Callable[[Request], ImageSource]:
    """A reader for one kind of LMDB.

    Args:
        files: names of the training and the validation LMDB in the data folder.
        value: turns a stored value into pixels.
        numbered: keys are 0, 1, ... in decimal ASCII; otherwise all keys there are, in their own order.
    """

    def read(request: Request) -> ImageSource:
        size = request.transform.size
        assert size is not None, "every LMDB dataset of the table has a size"
        return _source(request, files, value, (*size, 3), numbered)

    return read


def read_described(request: Request) -> ImageSource:
    """The LMDBs that `prepare` made of images of any shape: raw uint8 [H,W,C]."""
    about = description(request.path)
    shape = tuple(about.get(name) for name in ("height", "width", "channels"))
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise InputError(f"{request.path / DESCRIPTION} names no height, width and channels: prepare the images again")
    pixels = shape[0] * shape[1] * shape[2]

    def value(stored: bytes, name: str) -> np.ndarray:
        if len(stored) != pixels:
            raise InputError(f"{name} has {len(stored)} bytes, expected {'x'.join(map(str, shape))}: prepare the images again")
        return np.frombuffer(stored, np.uint8).reshape(shape)

    size = request.transform.size or shape[:2]
    return _source(request, STORES, value, (*size, shape[2]), True)


def description(folder: Path) -> dict[str, Any]:
    """What DESCRIPTION says; empty where there is none."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error)}): prepare the images again") from None
    if not isinstance(about, dict) or not isinstance(about.get("dataset"), str):
        raise InputError(f"{path} names no dataset: prepare the images again")
    return about


def _source(
    request: Request,
    files: Sequence[str],
    value: Callable[[bytes, str], np.ndarray],
    shape: tuple[int, int, int],
    numbered: bool,
) -> ImageSource:
    path = request.path / files[0 if request.split == "train" else 1]
    if not path.exists():
        raise InputError(f"no {path.name} in {request.path}: the {request.split} part is missing")
    lmdb = _library()
    env = _environment(path.resolve())

    def get(key: bytes) -> bytes | None:
        try:
            with env.begin() as transaction:
                return transaction.get(key)
        except lmdb.Error as error:
            raise InputError(f"{path} is damaged: {one_line(error)}; copy or build it again") from None

    count = env.stat()["entries"]
    keys: list[bytes] | None = None
    if not numbered:
        with env.begin() as transaction:
            keys = list(transaction.cursor().iternext(keys=True, values=False))
    if count == 0:
        raise InputError(f"{path} is empty: build it again")
    if numbered and get(str(count - 1).encode()) is None:
        raise InputError(f"{path} has {count} entries but none named {count - 1}: is it another dataset's file?")

    def label(i: int) -> str:
        return f"{path}:{i if keys is None else keys[i].decode('ascii', 'replace')}"

    def stored(i: int) -> bytes:
        content = get(str(i).encode() if keys is None else keys[i])
        if content is None:
            raise InputError(f"{path} has {count} entries but none named {i}: is it another dataset's file?")
        return content

    return LazySource(
        request.name,
        count,
        shape,
        lambda i: value(stored(i), label(i)),
        label,
        request.transform,
        Corrupt(request.max_corrupt),
        stored,
    )


def write_lmdb(path: Path, values: Iterable[Sequence[bytes]]) -> int:
    """Write the values of all chunks under 0, 1, ... into a new LMDB; how many. Each chunk is one transaction."""
    lmdb = _library()
    try:
        env = lmdb.open(str(path), map_size=2**26, sync=False, metasync=False)
        count = 0
        for chunk in values:
            while True:
                try:
                    with env.begin(write=True) as transaction:
                        for i, value in enumerate(chunk, count):
                            transaction.put(str(i).encode(), value)
                    break
                except lmdb.MapFullError:
                    env.set_mapsize(2 * env.info()["map_size"])
            count += len(chunk)
        env.sync(True)
        env.close()
    except lmdb.Error as error:
        raise InputError(f"cannot write {path} ({one_line(error)}): is the disk full?") from None
    return count
