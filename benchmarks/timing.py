"""An interleaved clock: A B A B ..., medians, so that a machine whose speed drifts treats all rivals alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from nvae_fast.memory import PeakMemory


class Timing(NamedTuple):
    """Milliseconds of one call over the counted rounds."""

    median_ms: float
    min_ms: float
    iqr_ms: float  # third quartile less first
    rounds: int


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """`call` recorded once and replayed as a CUDA graph, as the trainer runs it: the GPU is timed, not Python's launches.
    `call` itself where it cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # tuning, allocation
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:  # synchronises, or is not captured for another reason
        torch.cuda.synchronize()
        return call
    return graph.replay


class Work(NamedTuple):
    """Kernels, copies and fills that one call has the GPU do, and the milliseconds that they take on it."""

    launches: int
    busy_ms: float


def gpu_work(call: Callable[[], object]) -> Work:
    """That of one call, from a trace of its second."""
    from torch.profiler import ProfilerActivity, profile

    call()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Work(len(events), sum(event.time_range.elapsed_us() for event in events) / 1e3)


def gpu_columns(work: Work | None, median_ms: float | None) -> dict[str, float | None]:
    """What a row says of it: how many, and for which share of the call the GPU is busy. None on a CPU."""
    if work is None or median_ms is None:
        return {"launches": None, "busy_share": None}
    return {"launches": work.launches, "busy_share": work.busy_ms / median_ms}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """By how much tensors alive grow within a call at most: torch's own count on a GPU, else `PeakMemory`'s."""
    if device.type != "cuda":
        with PeakMemory() as memory:
            call()
        return memory.peak_bytes
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def interleaved(
    rivals: Mapping[str, Callable[[], object]], *, rounds: int = 15, warmup: int = 2, budget_s: float = 60.0
) -> dict[str, Timing]:
    """Time every rival once a round, in turn, for `rounds` rounds or until `budget_s` is spent (at least 3 rounds).

    Each call is timed alone, after a synchronisation of the GPU if there is one; Python's garbage collector is off meanwhile.
    """
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(warmup):
        for call in rivals.values():
            call()
    collecting = gc.isenabled()
    gc.disable()
    end = time.perf_counter() + budget_s
    try:
        for i in range(rounds):
            for name, call in rivals.items():
                sync()
                start = time.perf_counter()
                call()
                sync()
                times[name].append(1e3 * (time.perf_counter() - start))
            if i >= 2 and time.perf_counter() > end:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(statistics.median(values), min(values), quartiles[2] - quartiles[0], len(values))
