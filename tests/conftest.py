"""For every test: memory from torch.empty (also from C++) holds NaN, so that an output nobody wrote fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nvae_fast.cli import main

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    # Memory is filled only under deterministic algorithms; a warning, not an error, where one does not exist.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """Folder of the numbers taken from the reference implementation."""
    return Path(__file__).parent / "data" / "nvae_reference"


@pytest.fixture(scope="session")
def within_budget() -> Callable[[Tensor, Tensor, Tensor], None]:
    """within_budget(got, plain, exact): got may be twice as far from exact (float64) as the plain op in that dtype is, plus
    one unit in the last place of the largest value.

    `dtype` is the op's, where a result (the gradient of a parameter) has a wider one; `largest` the yardstick of a result
    that is 0 but for rounding."""

    def check(
        got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype | None = None, largest: float | None = None
    ) -> None:
        assert got.shape == exact.shape and got.dtype == plain.dtype and exact.dtype == torch.float64
        assert got.isfinite().all()
        if not got.numel():
            return
        error, plain_error = ((t.double() - exact).abs().max().item() for t in (got, plain))
        largest = exact.abs().max().item() if largest is None else largest
        budget = 2 * (plain_error + torch.finfo(dtype or got.dtype).eps * largest)
        assert error <= budget, f"error {error:.2e} over the budget {budget:.2e} (plain op: {plain_error:.2e})"

    return check


class FakeGraphs:
    """In the place of torch.cuda's streams and graphs: `recording` is set while a graph is recorded, `replay()` is what a
    replay does, `generators` are those that graphs know, and `events` says what streams do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.recording = False
        self.replay: Callable[[], None] = lambda: None
        self.generators: list[torch.Generator] = []
        self.events: list[str] = []
        fakes = self

        class Graph:
            def replay(self) -> None:
                fakes.replay()

            def register_generator_state(self, generator: torch.Generator) -> None:
                assert not fakes.recording
                fakes.generators.append(generator)

        @contextlib.contextmanager
        def record(graph: Graph, stream: Any, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            states = [generator.get_state() for generator in fakes.generators]
            fakes.recording = True
            try:
                yield
            finally:
                fakes.recording = False
                for generator, state in zip(fakes.generators, states, strict=True):
                    generator.set_state(state)  # recording draws nothing

        class Stream:
            def __init__(self, name: str) -> None:
                self.name = name

            def wait_stream(self, other: Stream) -> None:
                fakes.events.append(f"{self.name} waits for {other.name}")

        @contextlib.contextmanager
        def use(stream: Stream) -> Iterator[None]:
            fakes.events.append(f"on {stream.name}")
            yield

        names = {"Stream": lambda device: Stream("graph"), "current_stream": lambda device: Stream("caller"), "stream": use,
                 "CUDAGraph": Graph, "graph": record, "synchronize": lambda device: None}  # fmt: skip
        for name, fake in names.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> FakeGraphs:
    return FakeGraphs(monkeypatch)


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """cli("sample", run, "-n", 3): the exit code and what was printed."""

    def call(*argv: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in argv])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(cli) -> Callable[..., str]:
    """refused("part of the line", ...)(*argv): exit code 2 and one line on stderr, which holds all the parts."""

    def check(*parts: str) -> Callable[..., str]:
        def call(*argv: object) -> str:
            result = cli(*argv)
            assert result.code == 2, result
            assert result.err.startswith("nvae-fast: ") and result.err.count("\n") == 1, result.err
            for part in parts:
                assert part in result.err, result.err
            return result.err

        return call

    return check
