"""The reference's LMDB files, read lazily, never locked and never written."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .base import ImageSource, LazySource, Request, one_line
from .decode import decode
from .folder import read_folder, read_zip


def raw_rgb(value: bytes, name: str) -> np.ndarray:
    """uint8 [s,s,3] of s*s*3 bytes."""
    side = isqrt(len(value) // 3)
    if not side or side * side * 3 != len(value):
        raise InputError(f"{name} has {len(value)} bytes, expected 3 s^2 of raw RGB: is it another dataset's file?")
    return np.frombuffer(value, np.uint8).reshape(side, side, 3)


def encoded(value: bytes, name: str) -> np.ndarray:
    """uint8 [h,w,3] of the bytes of an image file."""
    return decode(lambda: io.BytesIO(value), name, 3)


@cache  # the library refuses to open one file twice in a process
def _environment(path: Path) -> Any:
    try:
        import lmdb
    except ImportError:
        raise InputError(f"reading {path} needs lmdb: pip install nvae_fast[data]") from None
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, max_spare_txns=16)
    except lmdb.Error as error:
        raise InputError(f"{path} is not a readable LMDB: {one_line(error)}") from None


def lmdb_reader(
    files: dict[str, str], value: Callable[[bytes, str], np.ndarray], *, numbered: bool = True
) -> Callable[[Request], ImageSource]:
    """A reader for one kind of LMDB; where the folder holds no LMDB, its images are read as by `folder`.

    Args:
        files: {'train': name, 'valid': name} of the LMDBs in the data folder.
        value: turns a stored value into pixels.
        numbered: keys are 0, 1, ... in decimal ASCII; otherwise all keys there are, in their own order.
    """

    def read(request: Request) -> ImageSource:
        if request.path.is_file():
            return read_zip(request)
        path = request.path / files[request.split]
        if not path.exists():
            if any((request.path / name).exists() for name in files.values()):
                raise InputError(f"no {path.name} in {request.path}: the {request.split} part is missing")
            return read_folder(request)
        environment = _environment(path.resolve())
        count = environment.stat()["entries"]
        keys: list[bytes] | None = None
        if not numbered:
            with environment.begin() as transaction:
                keys = list(transaction.cursor().iternext(keys=True, values=False))
        if count == 0:
            raise InputError(f"{path} is empty: build it again")

        def label(i: int) -> str:
            return f"{path}:{i if keys is None else keys[i].decode('ascii', 'replace')}"

        def pixels(i: int) -> np.ndarray:
            with environment.begin() as transaction:
                stored = transaction.get(str(i).encode() if keys is None else keys[i])
            if stored is None:
                raise InputError(f"{path} has {count} entries but none named {i}: is it another dataset's file?")
            return value(stored, label(i))

        size = request.transform.size
        assert size is not None, "every LMDB dataset of the table has a size"
        return LazySource(request.name, count, (*size, 3), pixels, label, request.transform)

    return read
