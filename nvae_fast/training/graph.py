"""The whole training step as one CUDA graph. Not yet run on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

WARM_UP = 3  # steps before the recording: they build what later steps reuse


def graph_obstacle(device: torch.device) -> str | None:
    """Why a step on this device cannot be a graph, in a few words; None if it can."""
    if device.type != "cuda":
        return f"the model is on the {device.type}, expected cuda"
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return f"there are {dist.get_world_size()} processes, expected one"
    return None


class StepGraph:
    """`graph(x, rate, kl_coeff, norm_coeff)` does what `run` does with the same arguments, to the bit.

    The first calls run as they are, on a stream of their own. The next one is recorded, with x and the numbers in memory of the
    graph, and replayed as long as `valid()`; else all begins anew. Batches of another shape, and calls where the regularisers
    are switched on or off, run as they are. Where recording fails, one line on stderr says why, and all steps run as they are.
    """

    def __init__(self, run: Callable[..., dict[str, Tensor]], device: torch.device, valid: Callable[[], bool]) -> None:
        self.run, self.device, self.valid = run, device, valid
        self._stream = torch.cuda.Stream(device)
        self._numbers = torch.zeros(3, dtype=torch.float64, device=device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __call__(self, x: Tensor, rate: float, kl_coeff: float, norm_coeff: float) -> dict[str, Tensor]:
        if self._graph is not None and not self.valid():
            self._graph, self._calls = None, 0
        kind = (x.shape, x.stride(), x.dtype, bool(norm_coeff))
        if self._calls < WARM_UP or self._failed:
            self._calls += 1
            return self._aside(x, rate, kl_coeff, norm_coeff)
        if self._graph is None:
            self._kind = kind
            self._record(x, norm_coeff)
        if self._graph is None or kind != self._kind:
            return self._aside(x, rate, kl_coeff, norm_coeff)
        self._x.copy_(x, non_blocking=True)
        for place, number in zip(self._numbers.unbind(), (rate, kl_coeff, norm_coeff), strict=True):
            place.fill_(number)
        self._graph.replay()
        return {name: t.clone() for name, t in self._terms.items()}

    def _aside(self, *args: Tensor | float) -> dict[str, Tensor]:
        """On the stream that the recording will use: autograd remembers on which stream a parameter was first used."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = self.run(*args)
        current.wait_stream(self._stream)
        return terms

    def _record(self, x: Tensor, norm_coeff: float) -> None:
        self._x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        rate, *coefficients = self._numbers.unbind()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: a loader's thread that pins memory meanwhile does no harm
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                kl_coeff, weight = (c.float() for c in coefficients)  # as Python's floats enter float32 tensors
                self._terms = self.run(self._x, rate, kl_coeff, weight if norm_coeff else 0.0)
        except Exception as error:  # whatever refuses to be recorded
            self._failed = True
            line = (str(error).splitlines() or [""])[0]
            print(f"nvae-fast: the step runs without a CUDA graph: {type(error).__name__}: {line}", file=sys.stderr)
        else:
            self._graph = graph
