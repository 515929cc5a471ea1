"""How fast a loader is: compare it with the images/s of a training step."""

from __future__ import annotations

import time

import torch

from .loader import Loader


def images_per_second(loader: Loader, seconds: float = 5.0, warmup: int = 2) -> float:
    """Images that the loader gives in a second when nothing else is done, over whole batches and, if need be, epochs.

    Args:
        seconds: how long to measure. warmup: batches before that.
    """
    epoch = images = 0
    start, seen = time.perf_counter(), 0
    while True:
        loader.set_epoch(epoch)
        for x in loader:
            seen += 1
            if seen <= warmup:
                start = _now(x)
                continue
            images += len(x)
            if time.perf_counter() - start >= seconds:
                return images / (_now(x) - start)
        epoch += 1


def _now(x: torch.Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter()
