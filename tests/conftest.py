"""For every test: memory from torch.empty (also from C++) holds NaN, so that an output nobody wrote fails."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

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
