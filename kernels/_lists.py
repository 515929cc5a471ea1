"""Lists of tensors for one launch: tables of addresses and sizes in the GPU's memory, and which program works on which item.

A table of addresses is uploaded from pinned memory, without waiting, and kept by its contents: where the same tensors come
again nothing is copied. While a CUDA graph is captured a copy becomes a part of the graph and reads its source at every replay;
such sources are set aside beforehand, because pinned memory cannot be had then, and are never written again. A table of sizes
alone is `standing`: one upload, which is waited for, serves all streams and graphs.
"""

from __future__ import annotations

import functools
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

CAPACITY = 64  # tables kept for later calls
SPARES = 8  # pinned buffers of a size kept for captures

_lock = threading.Lock()  # backward runs in threads of its own
_tables: OrderedDict[tuple[bytes, torch.device, int], Tensor] = OrderedDict()
_standing: dict[tuple[bytes, torch.device], Tensor] = {}
_spares: dict[int, list[Tensor]] = {}
_in_graphs: list[Tensor] = []  # what captured graphs read, as long as the process lives

T = TypeVar("T")


def numbers(rows: Iterable[Sequence[int]]) -> bytes:
    """The rows of a table, end to end, as 64-bit integers."""
    return array("q", [n for row in rows for n in row]).tobytes()


def upload(values: bytes, device: torch.device) -> Tensor:
    """These 64-bit integers on `device`. Raises RuntimeError during a capture that no ordinary call has gone before."""
    if device.type != "cuda":
        return _words(values).clone()
    capturing = torch.cuda.is_current_stream_capturing()
    key = values, device, torch.cuda.current_stream(device).cuda_stream
    with _lock:
        found = _tables.get(key)
        if found is None and capturing:
            return _captured(values, device)
        if found is None:
            found = _tables[key] = _filled(_pinned(len(values)), values).to(device, non_blocking=True)
            if len(_tables) > CAPACITY:
                _tables.popitem(last=False)
        _tables.move_to_end(key)
        spares = _spares.setdefault(len(values), [])
        if capturing:
            _in_graphs.append(found)
        elif len(spares) < SPARES:  # one a call: a capture, on a stream of its own, makes each of them anew
            spares.append(_pinned(len(values)))
        return found


def standing(values: bytes, device: torch.device) -> Tensor:
    """These 64-bit integers on `device`, for good: a table of sizes, of which a process has few. Raises as `upload` does."""
    if device.type != "cuda":
        return _words(values)
    with _lock:
        found = _standing.get((values, device))
        if found is None and torch.cuda.is_current_stream_capturing():
            return _captured(values, device)
        if found is None:
            found = _standing[values, device] = _filled(_pinned(len(values)), values).to(device, non_blocking=True)
            torch.cuda.current_stream(device).synchronize()
        return found


def _captured(values: bytes, device: torch.device) -> Tensor:
    """A copy that is a node of the graph: the table holds nothing before a replay, so it is no table for other calls."""
    spares = _spares.get(len(values))
    if not spares:
        raise RuntimeError("a CUDA graph captures its first call of an op on lists: make the call once before, uncaptured")
    _in_graphs.append(_filled(spares.pop(), values))
    return _in_graphs[-1].to(device, non_blocking=True)


def _words(values: bytes) -> Tensor:
    return torch.frombuffer(bytearray(values or bytes(8)), dtype=torch.int64)


def _pinned(size: int) -> Tensor:
    return torch.empty(max(size // 8, 1), dtype=torch.int64, pin_memory=True)


def _filled(buffer: Tensor, values: bytes) -> Tensor:
    return buffer.copy_(_words(values))


@functools.lru_cache(maxsize=16)
def jobs(counts: tuple[int, ...]) -> bytes:
    """The item of every program, item i having counts[i] programs one after another."""
    return b"".join(count * i.to_bytes(8, "little") for i, count in enumerate(counts))


def starts(counts: Sequence[int]) -> list[int]:
    """Where each item begins when items of these sizes lie end to end."""
    found = [0]
    for count in counts:
        found.append(found[-1] + count)
    return found[:-1]


def grouped(items: Sequence[T], key: Callable[[T], object]) -> Iterator[list[T]]:
    """Items of one key together, in the order of first appearance."""
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return iter(groups.values())


def dense_rows(t: Tensor) -> Tensor:
    """t [R, ...] where its memory is its rows one after another, each dense; else a contiguous copy."""
    channels_last = t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    return t if channels_last else t.contiguous()


def in_order_of(rows: Tensor, t: Tensor) -> Tensor:
    """t with its elements in the order that those of `rows`, of the same shape, have in memory."""
    if all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), rows.stride(), strict=True)):
        return t
    return torch.empty_strided(rows.shape, rows.stride(), dtype=t.dtype, device=t.device).copy_(t)


def aligned(columns: int, *tensors: Tensor | None) -> bool:
    """Whether rows of this length can be read and written 16 bytes at a time."""
    return all(t is None or not (t.data_ptr() % 16 or columns * t.element_size() % 16) for t in tensors)
