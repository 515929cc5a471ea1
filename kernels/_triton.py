"""What the Triton implementations share on the host's side. Only an op's own triton.py imports Triton, on its first call.

Kernels see images as rows: x [M, C], M = B H W pixels, dense (channels-last).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TICKETS = 1 << 13  # that launches of a stream share
SPARES = 8  # streams of captures that nothing ran on before

_lock = threading.Lock()  # backward runs in threads of its own
_tickets: dict[tuple[torch.device, int], Tensor] = {}
_spare_tickets: dict[torch.device, list[Tensor]] = {}


def can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="triton": tensors on one CUDA device, of a storage type that the kernels know."""
    for t in tensors:
        if t.device.type != "cuda":
            return f"it takes cuda tensors, not {t.device.type}"
        if t.dtype not in DTYPES:
            return f"it takes float32, bfloat16 or float16, not {str(t.dtype).removeprefix('torch.')}"
        if t.device != tensors[0].device:
            return f"it takes tensors of one device, not of {tensors[0].device} and {t.device}"
    return _missing() or (_too_old(tensors[0].device.index or 0) if tensors else None)


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def _too_old(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


# Constants of the process, which torch.compile must not look into (see _impl.py).
for _function in (_missing, _too_old):
    vars(_function)["_dynamo_marked_constant"] = True


def register(op: str, *names: str) -> None:
    """Gives each schema nvae_fast::name the launcher `name` of kernels/<op>/triton.py on CUDA, imported by its first call."""
    for name in names:
        torch.library.impl(f"nvae_fast::{name}", "cuda")(_launcher(op, name))


def _launcher(op: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"nvae_fast.kernels.{op}.triton"), name)

    def launch(*args: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors
        with torch.cuda.device_of(next(_tensors(args))):
            return load()(*args)

    return launch


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    """Those among the arguments and in their lists."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(arg)


def autotuned(*key: str) -> Callable[[Any], Any]:
    """Decorates an elementwise kernel: the number of values in a tile, BLOCK, is timed for each `key` of arguments. Not for
    kernels that sum, where it would decide the bits. The interpreter, which cannot time, takes the first."""
    import triton

    tiles = ((2048, 4),) if triton.knobs.runtime.interpret else ((2048, 4), (1024, 4), (4096, 8))
    return triton.autotune([triton.Config({"BLOCK": block}, num_warps=warps) for block, warps in tiles], key=list(key))


def image(name: str, t: Tensor, like: Tensor | None = None) -> Tensor:
    """t [B, C, H, W] dense and channels-last; raises where it is not of the shape and dtype of `like`."""
    if t.dim() != 4 or (like is not None and (t.shape != like.shape or t.dtype != like.dtype)):
        wanted = "[B, C, H, W]" if like is None else f"{tuple(like.shape)} and {like.dtype}"
        raise RuntimeError(f"{name} has shape {tuple(t.shape)} and type {t.dtype}; expected {wanted}")
    return t.contiguous(memory_format=torch.channels_last)


def line_strides(t: Tensor) -> tuple[int, int, int] | None:
    """Strides of batch elements, channels and pixels of t [B, C, H, W], where each map [H, W] is one line; else None."""
    b, c, h, w = t.stride()
    if t.shape[3] == 1:
        return b, c, h
    return (b, c, w) if t.shape[2] == 1 or h == t.shape[3] * w else None


def as_lines(t: Tensor) -> Tensor:
    """t, or a copy whose maps are lines."""
    return t if line_strides(t) else t.contiguous()


def floats(name: str, t: Tensor | None, *shape: int) -> Tensor | None:
    """A float32 table of that shape, dense, or None."""
    if t is None:
        return None
    if t.shape != shape or t.dtype != torch.float32:
        raise RuntimeError(f"{name} has shape {tuple(t.shape)} and type {t.dtype}; expected float32 {shape}")
    return t.contiguous()


def wide(t: Tensor) -> bool:
    """Whether offsets into t need 64 bits. Those into the last, partial tile may pass the end by less than 2^20."""
    return 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) >= 2**31 - 2**20


def unit(n: int) -> int:
    """The largest power of 2 that divides n, 16 at most."""
    return math.gcd(n, 16)


def tickets(device: torch.device, count: int) -> Tensor:
    """`count` int32 or more, 0 now and to be left 0 by the launch that they are passed to (_join.py).

    Launches of a stream follow each other and share them, so that nobody has to zero them again. They are never freed: CUDA
    graphs keep their address, and those captured on one stream share them too, so they must not run at the same time. Raises
    RuntimeError during a capture on a device that no ordinary call has gone before on.
    """
    if count > TICKETS:
        return torch.zeros(count, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    found = _tickets.get((device, stream))
    if found is None:
        with _lock:
            found = _tickets[device, stream] = _more_tickets(device)
    return found


def _more_tickets(device: torch.device) -> Tensor:
    """Zeros that were written before a capture, not by it: a graph would write them at its replays alone."""
    spares = _spare_tickets.setdefault(device, [])
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if not spares:
            raise RuntimeError("a CUDA graph captures its first call of a fused op: make the call once before, uncaptured")
        return spares.pop()
    count = SPARES - len(spares) if device.type == "cuda" else 0
    found, *more = torch.zeros(1 + count, TICKETS, dtype=torch.int32, device=device).unbind()
    spares += more
    return found


def power_of_2(n: int, most: int) -> int:
    """The smallest power of 2 that holds n, `most` (itself one) at most."""
    return min(1 << max(n - 1, 0).bit_length(), most)


def tasks(rows: int, least: int, wanted: int) -> tuple[int, int]:
    """(tasks, rows of a task) for an ordered reduction: `wanted` tasks at most, a multiple of `least` rows each. A function of
    the sizes alone, so that the order of a sum does not depend on the GPU."""
    tiles = -(-rows // least)
    chunk = -(-tiles // max(wanted, 1)) * least
    return -(-rows // chunk), chunk
