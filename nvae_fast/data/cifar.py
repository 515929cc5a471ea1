"""CIFAR-10 as it is distributed: Python pickles or binary files, unpacked or in their tar archive."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .base import ImageSource, Request, from_array, one_line

_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "valid": ["test_batch"]}


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, with which Python 3 writes bytes into old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not read")
    return text.encode("latin1")


def _numpy_rebuilders() -> dict[tuple[str, str], Any]:
    """The globals in a pickle of arrays, bytes, strings, lists and dicts, by the names that numpy 1 and 2 give them."""
    sample = np.zeros(1)  # knows its rebuilders, wherever this version of numpy keeps them
    table: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        table[f"{core}.multiarray", "_reconstruct"] = sample.__reduce__()[0]
        table[f"{core}.numeric", "_frombuffer"] = sample.__reduce_ex__(5)[0]
    return table


class _Unpickler(pickle.Unpickler):
    """Loads plain data and numpy arrays; any other global is refused before it is imported."""

    def __init__(self, stream: io.BytesIO, name: str):
        super().__init__(stream, encoding="bytes")
        self._name, self._allowed = name, _numpy_rebuilders()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise InputError(f"{self._name} asks for {module}.{name}, which no CIFAR-10 file needs: do not trust this file")
        return self._allowed[module, name]


def _from_pickle(content: bytes, name: str) -> np.ndarray:
    try:
        batch = _Unpickler(io.BytesIO(content), name).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can make any opcode fail in its own way
        raise InputError(f"{name} is not a readable CIFAR-10 pickle ({one_line(error)}): fetch it again") from None
    data = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    found = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,) or not len(data):
        raise InputError(f"{name}: 'data' is {found}, expected uint8 (N, 3072): fetch it again")
    return data


def _from_binary(content: bytes, name: str) -> np.ndarray:
    if not content or len(content) % 3073:
        raise InputError(f"{name} has {len(content)} bytes, expected a multiple of 3073: fetch it again")
    return np.frombuffer(content, np.uint8).reshape(-1, 3073)[:, 1:]


def find_cifar(path: Path) -> Path | None:
    """The folder of batches or the tar archive that `path` is or holds."""
    if path.is_file():
        return path if path.name.endswith((".tar.gz", ".tgz")) else None
    known = [stem + end for stem in ("data_batch_1", "test_batch") for end in ("", ".bin")]
    for place in (path, *(path / name for name in _FOLDERS)):
        if any((place / name).is_file() for name in known):
            return place
    return next((path / name for name in _ARCHIVES if (path / name).is_file()), None)


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = archive.extractfile(member)
    return stream.read() if stream is not None else b""


def _load(files: Mapping[str, Callable[[], bytes]], split: str, place: Path) -> np.ndarray:
    """uint8 [N,3072] of a split's batches; files maps base names to readers."""
    parts = []
    for stem in _SPLITS[split]:
        if stem in files:
            parts.append(_from_pickle(files[stem](), f"{place}/{stem}"))
        elif f"{stem}.bin" in files:
            parts.append(_from_binary(files[f"{stem}.bin"](), f"{place}/{stem}.bin"))
        else:
            raise InputError(f"no {stem} (or {stem}.bin) in {place}: the {split} part of CIFAR-10 is incomplete")
    return np.concatenate(parts)


def read_cifar10(request: Request) -> ImageSource:
    """data_batch_1 to 5 train, test_batch validates; rows hold 1024 red, 1024 green and 1024 blue pixels."""
    place = find_cifar(request.path)
    if place is None:
        raise InputError(f"no CIFAR-10 in {request.path}: expected {', '.join(_FOLDERS)} or {_ARCHIVES[0]}")
    if place.is_dir():
        rows = _load({file.name: file.read_bytes for file in place.iterdir()}, request.split, place)
    else:
        try:
            with tarfile.open(place) as archive:
                members = {Path(m.name).name: m for m in archive.getmembers() if m.isfile()}
                readers = {name: partial(_member, archive, member) for name, member in members.items()}
                rows = _load(readers, request.split, place)
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            raise InputError(f"{place} is not a readable tar archive ({one_line(error)}): fetch it again") from None
    return from_array(request, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
