"""CIFAR-10 as it is distributed: Python pickles or binary files, unpacked or in their tar archive."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError
from .base import ImageSource, Request, from_array, one_line, read_up_to
from .tar import ERRORS, members

_FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
_ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_MAX_BATCH = 2**26  # bytes
_SPLITS = {"train": [f"data_batch_{i}" for i in range(1, 6)], "valid": ["test_batch"]}


def _encode(text: str, encoding: str) -> bytes:
    """Stands in for _codecs.encode, with which Python 3 writes bytes into old pickle protocols."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding!r} is not read")
    return text.encode("latin1")


class _Type:
    """Stands in for numpy.ndarray and numpy.dtype: only remembers what it is called with."""

    def __init__(self, *arguments: object):
        self.name = arguments[0] if arguments else None

    def __setstate__(self, state: object) -> None:
        pass


class _Array:
    """Stands in for an array under construction: numpy unpickles nothing, and only rows of uint8 come out of it."""

    rows: np.ndarray | None = None
    found = "no array"

    def fill(self, shape: object, dtype: object, order: str, content: Any) -> None:
        name = dtype.name if isinstance(dtype, _Type) and isinstance(dtype.name, (str, bytes)) else "?"
        if not isinstance(shape, tuple) or len(shape) > 8 or not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape):
            raise ValueError("an array without a shape")
        self.found = f"{'uint8' if name in _UINT8 else name[:20]} {shape}"
        if len(shape) == 2 and name in _UINT8:
            self.rows = np.frombuffer(content, np.uint8).reshape(shape, order="F" if order == "F" else "C")

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.fill(shape, dtype, "F" if fortran else "C", content.encode("latin1") if isinstance(content, str) else content)


_UINT8: tuple[object, ...] = ("u1", "|u1", b"u1", b"|u1")


def _reconstruct(*arguments: object) -> _Array:
    return _Array()


def _frombuffer(content: bytes, dtype: object, shape: object, order: str, *axes: object) -> _Array:
    array = _Array()
    array.fill(shape, dtype, order, content)
    return array


_GLOBALS = {
    ("numpy", "ndarray"): _Type,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in ("numpy.core", "numpy._core")},
    **{(f"{core}.numeric", "_frombuffer"): _frombuffer for core in ("numpy.core", "numpy._core")},
}
"""The globals in a pickle of arrays, bytes, strings, lists and dicts, by the names that numpy 1 and 2 give them."""


_OPCODES = """PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING
BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
MEMOIZE GLOBAL STACK_GLOBAL REDUCE""".split()


_InPython: Any = vars(pickle)["_Unpickler"]  # the type stubs do not know it


class _Unpickler(_InPython):
    """Loads plain data and byte arrays; any other global is refused before it is imported, and any other opcode.

    This is the unpickler written in Python: the one in C allocates whatever a place in its memo says. A key of a dictionary is
    a string: hashing tuples that hold each other twice can take for ever.
    """

    dispatch = {code[0]: _InPython.dispatch[code[0]] for code in (getattr(pickle, name) for name in _OPCODES)}

    def __init__(self, stream: io.BytesIO, name: str):
        super().__init__(stream, encoding="bytes")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise InputError(f"{self._name} asks for {module}.{name}, which no CIFAR-10 file needs: do not trust this file")
        return _GLOBALS[module, name]

    def _fill(self, items: list) -> None:
        if type(self.stack[-1]) is not dict or not all(isinstance(key, (str, bytes)) for key in items[::2]):
            raise ValueError("a dictionary whose keys are no strings")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _setitems(self) -> None:
        self._fill(self.pop_mark())

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._fill(items)

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Type, _Array):
            raise ValueError("a state for what is no array")
        self.stack[-1].__setstate__(state)

    dispatch |= {
        pickle.SETITEMS[0]: _setitems,
        pickle.SETITEM[0]: _setitem,
        pickle.DICT[0]: _dict,
        pickle.BUILD[0]: _build,
    }


def _from_pickle(content: bytes, name: str) -> np.ndarray:
    try:
        batch = _Unpickler(io.BytesIO(content), name).load()
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can make any opcode fail in its own way
        raise InputError(f"{name} is not a readable CIFAR-10 pickle ({one_line(error)}): fetch it again") from None
    data = batch.get(b"data", batch.get("data")) if isinstance(batch, dict) else None
    found = data.found if isinstance(data, _Array) else type(data).__name__
    rows = data.rows if isinstance(data, _Array) else None
    if rows is None or rows.shape[1] != 3072 or not len(rows):
        raise InputError(f"{name}: 'data' is {found}, expected uint8 (N, 3072): fetch it again")
    return rows


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


def _read(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return _checked(stream, path.name)


def _checked(stream: IO[bytes], name: str) -> bytes:
    content = read_up_to(stream, _MAX_BATCH + 1)
    if len(content) > _MAX_BATCH:
        raise InputError(f"{name} has over {_MAX_BATCH >> 20} MiB, CIFAR-10's batches have 30: is it another file?")
    return content


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


def _archive(place: Path, split: str) -> dict[str, Callable[[], bytes]]:
    """Readers of a split's batches in a tar archive, which is read once, from the front."""
    wanted = {stem + end for stem in _SPLITS[split] for end in ("", ".bin")}
    found: dict[str, bytes] = {}
    try:
        with open(place, "rb") as stream:
            for info, archive in members(stream, "r|*"):
                name = Path(info.name).name
                if name in wanted:
                    member = archive.extractfile(info)
                    found[name] = _checked(member or io.BytesIO(), f"{place}/{name}")
    except InputError:
        raise
    except ERRORS as error:
        raise InputError(f"{place} is not a readable tar archive ({one_line(error)}): fetch it again") from None
    return {name: partial(bytes, content) for name, content in found.items()}


def read_cifar10(request: Request) -> ImageSource:
    """data_batch_1 to 5 train, test_batch validates; rows hold 1024 red, 1024 green and 1024 blue pixels."""
    place = find_cifar(request.path)
    if place is None:
        raise InputError(f"no CIFAR-10 in {request.path}: expected {', '.join(_FOLDERS)} or {_ARCHIVES[0]}")
    if place.is_dir():
        rows = _load({file.name: partial(_read, file) for file in place.iterdir()}, request.split, place)
    else:
        rows = _load(_archive(place, request.split), request.split, place)
    return from_array(request, rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
