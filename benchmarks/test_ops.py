"""The suite of ops for pytest-benchmark: `pytest benchmarks/test_ops.py --benchmark-json=FILE`. `make test` leaves it out.

The benchmark's own figures are those of the implementation that `auto` prefers, forward and backward; the rows of the suite,
rivals and checks included, are in extra_info.
"""

from __future__ import annotations

import pytest
import torch

from nvae_fast.benchmarks.cases import select
from nvae_fast.benchmarks.report import copy_rate
from nvae_fast.benchmarks.suite import contenders, measure

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rate() -> float:
    return copy_rate(CPU)


@pytest.mark.parametrize("case", select("ops"), ids=lambda case: case.name)
def test_op(benchmark, case, rate):
    rows = measure(case, rounds=5, device=CPU, copy_rate=rate)
    benchmark.extra_info["rows"] = rows
    assert all(row["check"]["ok"] for row in rows if row["impl"].startswith("ours:"))
    ours, *_ = contenders(case, CPU)[0].values()
    benchmark.pedantic(ours, args=("fwd_bwd",), rounds=10, warmup_rounds=2)
