"""An interleaved clock: A B A B ..., medians, so that a machine whose speed drifts treats all rivals alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Milliseconds of one call over the counted rounds."""

    median_ms: float
    min_ms: float
    iqr_ms: float  # third quartile less first
    rounds: int


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
