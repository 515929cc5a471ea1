"""Steps as CUDA graphs, on a CPU: what stands for a recording is the step itself. Times are never asserted."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nvae_fast.benchmarks import graphs, steps
from nvae_fast.presets import PRESETS
from nvae_fast.training.step import TrainingStep

CPU = torch.device("cpu")
SMALL = dataclasses.replace(steps.shrunk(PRESETS["demo"], 1, 2), num_channels_enc=4, num_channels_dec=4, num_latent_scales=2)


def record(call):
    """As `timing.graphed`: some calls before, and something else that does the same."""
    for _ in range(3):
        call()
    return lambda: call()


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(TrainingStep, "recorded", True)
    monkeypatch.setattr(graphs, "graphed", record)
    return lambda dtype=torch.float32: steps.contenders(SMALL, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_their_first_replay_has_the_numbers_of_the_first_step(found, dtype):
    every = found(dtype)
    exact = every.pop("exact")
    every |= steps.recorded(every, pytest.fail)
    assert [*every][-2:] == ["ours:graph", "eager_graph"]
    checks = steps.check_all(every, exact)
    assert all(check["ok"] for check in checks.values()), checks
    for name in ("ours:graph", "eager_graph"):  # and it goes on from there
        before = every[name].backward()
        assert every[name].backward() != before


def test_a_replay_that_does_nothing_is_seen(found, monkeypatch):
    monkeypatch.setattr(graphs, "graphed", lambda call: [call() for _ in range(3)] and (lambda: None))
    every = found()
    exact = every.pop("exact")
    every |= steps.recorded(every, pytest.fail)
    checks = steps.check_all(every, exact)
    assert [name for name, check in checks.items() if not check["ok"]] == ["eager_graph"]


def test_what_is_not_recorded_has_no_row_and_a_line_says_so(found, monkeypatch, capsys):
    monkeypatch.setattr(TrainingStep, "recorded", False)
    monkeypatch.setattr(graphs, "graphed", lambda call: call)
    said = []
    assert steps.recorded(found(), said.append) == {}
    assert said == [
        "  no row for ours:graph: RunError: our step was not recorded",
        "  no row for eager_graph: RunError: the plain step was not recorded",
    ]
