from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nvae_fast.benchmarks import cases, report
from nvae_fast.benchmarks.cases import Case

SMALL = [
    Case("ops", "bn_act", (2, 4, 6, 6)),
    Case("ops", "depthwise_conv", (2, 8, 6, 6)),
    Case("ops", "depthwise_conv", (2, 8, 6, 6), torch.bfloat16, "contiguous"),
    Case("ops", "bn_swish_depthwise", (2, 8, 6, 6)),
    Case("ops", "pointwise_conv", (2, 4, 6, 6)),
    Case("ops", "residual_normal", (2, 3, 4, 4)),
    Case("ops", "logistic_mixture_log_prob", (2, 100, 4, 4)),
    Case("ops", "power_iteration", (6,)),
    Case("ops", "weight_norm", (5,)),
    Case("ops", "flow_cell", (2, 4, 6, 6)),
    Case("ops", "se_residual", (2, 32, 4, 4)),
    Case("cell", "inverted_residual", (2, 4, 6, 6)),
    Case("cell", "preact_branch", (2, 4, 8, 8)),
    Case("cell", "cell", (2, 4, 6, 6)),
]
"""Every recipe once at least, each a few milliseconds."""


@pytest.fixture(autouse=True)
def small(monkeypatch) -> Iterator[None]:
    """The table holds small cases, copies are short, and one thread runs."""
    monkeypatch.setattr(cases, "CASES", SMALL)
    monkeypatch.setattr(report, "COPY_BYTES", 2**16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
