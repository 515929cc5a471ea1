"""What a call does on a GPU, recorded as one CUDA graph and replayed. Not yet run on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: they build what later ones reuse

Found = dict[str, Tensor]


def _always() -> bool:
    return True


class CallGraph:
    """`graph(*args)` does what `run(*args)` does, to the bit; it returns tensors by name.

    The first calls run as they are, on a stream of their own. The next one is recorded, and replayed as long as `valid()`; else
    all begins anew. Calls of another kind, of other arguments unless a subclass says otherwise, run as they are. Where
    recording fails, one line on stderr says why, and all calls run as they are.

    what: the name of it in that line. generators: those that `run` draws from beside the device's own; a replay draws from
    where they stand then.
    """

    def __init__(self, what: str, run: Callable[..., Found], device: torch.device, *, valid: Callable[[], bool] = _always,
                 generators: Sequence[torch.Generator] = ()) -> None:  # fmt: skip
        self.what, self.run, self.device, self.valid, self.generators = what, run, device, valid, generators
        self._stream = torch.cuda.Stream(device)
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._failed = False

    def __call__(self, *args: Any) -> Found:
        if self._graph is not None and not self.valid():
            self._graph, self._calls = None, 0
        kind = self.kind(*args)
        if self._calls < WARM_UP or self._failed:
            self._calls += 1
            return self._aside(*args)
        if self._graph is None:
            self._kind = kind
            self._record(*args)
        if self._graph is None or kind != self._kind:
            return self._aside(*args)
        self.fill(*args)
        self._graph.replay()
        return {name: t.clone() for name, t in self._found.items()}

    @property
    def ready(self) -> bool:
        """Whether the next call of its kind is a replay."""
        return self._graph is not None and self.valid()

    # ---- what a subclass with arguments that change from replay to replay says about them

    def kind(self, *args: Any) -> Hashable:
        """Calls of one kind can replay each other."""
        return args

    def places(self, *args: Any) -> tuple[Any, ...]:
        """Memory for the arguments that stays the graph's."""
        return args

    def recorded(self, *places: Any) -> Found:
        """`run` on these places, during the recording."""
        return self.run(*places)

    def fill(self, *args: Any) -> None:
        """These arguments into their places, before a replay."""

    def _aside(self, *args: Any) -> Found:
        """On the stream that the recording will use: autograd remembers on which stream a parameter was first used."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = self.run(*args)
        current.wait_stream(self._stream)
        return found

    def _record(self, *args: Any) -> None:
        places = self.places(*args)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            for generator in self.generators:
                graph.register_generator_state(generator)
            # thread_local: a loader's thread that pins memory meanwhile does no harm
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._found = self.recorded(*places)
        except Exception as error:  # whatever refuses to be recorded
            self._failed = True
            line = (str(error).splitlines() or [""])[0]
            print(f"nvae-fast: {self.what} runs without a CUDA graph: {type(error).__name__}: {line}", file=sys.stderr)
        else:
            self._graph = graph
