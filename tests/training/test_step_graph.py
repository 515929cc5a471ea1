"""When a step is recorded and replayed, on a stand-in for CUDA's graphs, whose replay computes from what memory holds then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nvae_fast.graph import WARM_UP
from nvae_fast.training.graph import StepGraph, graph_obstacle

from .stepping import Run


class Device:
    """Counts how calls of `run` came about; `refuse` makes recording fail."""

    def __init__(self, graphs):
        self.direct = self.recorded = self.replayed = 0
        self.refuse, self.ok = False, True
        self.graphs, graphs.replay = graphs, self.replay
        self.graph = StepGraph(self.run, torch.device("cpu"), lambda: self.ok)

    def replay(self):
        self.replayed += 1
        x, rate, _, norm_coeff = self.arguments
        assert rate.data_ptr() == self.graph._numbers.data_ptr()
        _, kl_coeff, weight = self.graph._numbers.float()  # which the recording holds, too
        self.out.copy_(self.formula(x, rate, kl_coeff, weight if isinstance(norm_coeff, torch.Tensor) else 0.0))

    @staticmethod
    def formula(x, rate, kl_coeff, norm_coeff):
        return x.sum() * 100 + rate * 10 + kl_coeff + norm_coeff / 10

    def run(self, x, rate, kl_coeff, norm_coeff):
        if not self.graphs.recording:
            self.direct += 1
            return {"total": torch.as_tensor(self.formula(x, rate, kl_coeff, norm_coeff)).float()}
        if self.refuse:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        assert (rate.dtype, kl_coeff.dtype) == (torch.float64, torch.float32)
        self.recorded += 1
        self.arguments, self.out = (x, rate, kl_coeff, norm_coeff), torch.full((), torch.nan)
        return {"total": self.out}

    def __call__(self, value, rate=1.0, kl_coeff=2.0, norm_coeff=3.0, size=4):
        found = self.graph(torch.full((size,), value), rate, kl_coeff, norm_coeff)["total"]
        expected = self.formula(torch.full((size,), value), rate, kl_coeff, norm_coeff)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        return found

    @property
    def counts(self):
        return self.direct, self.recorded, self.replayed


@pytest.fixture
def device(fake_graphs):
    return Device(fake_graphs)


def test_recorded_once_and_replayed_with_new_values(device):
    kept = [device(float(i), rate=i / 7, kl_coeff=i / 10, norm_coeff=1.0 + i) for i in range(WARM_UP + 4)]
    assert device.counts == (WARM_UP, 1, 4)
    assert len({t.item() for t in kept}) == len(kept)  # what a call returned stays when the next one is replayed


def test_a_call_that_is_not_replayed_runs_between_what_the_callers_stream_does_before_and_after(device, fake_graphs):
    device(1.0)
    assert fake_graphs.events == ["graph waits for caller", "on graph", "caller waits for graph"]


def test_other_batches_and_no_regularisers_run_as_they_are(device):
    for _ in range(WARM_UP + 1):
        device(1.0)
    device(1.0, size=3)
    device(1.0, norm_coeff=0.0)
    assert device.counts == (WARM_UP + 2, 1, 1)
    device(2.0)
    assert device.counts == (WARM_UP + 2, 1, 2)


def test_without_regularisers_from_the_start(device):
    for i in range(WARM_UP + 2):
        device(float(i), norm_coeff=0.0)
    assert device.counts == (WARM_UP, 1, 2) and device.arguments[3] == 0.0 and not isinstance(device.arguments[3], torch.Tensor)


def test_all_begins_anew_where_memory_moved(device):
    for _ in range(WARM_UP + 1):
        device(1.0)
    device.ok = False
    device(2.0)
    device.ok = True
    for _ in range(WARM_UP):
        device(3.0)
    assert device.counts == (2 * WARM_UP, 2, 2)


def test_what_cannot_be_recorded_runs_as_it_is(device, capsys):
    device.refuse = True
    for i in range(WARM_UP + 3):
        device(float(i))
    assert device.counts == (WARM_UP + 3, 0, 0)
    said = "nvae-fast: the step runs without a CUDA graph: RuntimeError: operation not permitted\n"
    assert capsys.readouterr().err == said


def test_the_rate_is_a_number_after_a_recorded_step(fake_graphs, monkeypatch):
    """Which checkpoints hold, and whoever resumes without a graph."""
    monkeypatch.setattr("nvae_fast.training.step.graph_obstacle", lambda device: None)
    run = Run(graph=True)
    for i in range(WARM_UP + 2):
        run(rate=0.01 * i)
        assert [group["lr"] for group in run.optimizer.param_groups] == [0.01 * i]
        assert isinstance(run.optimizer.param_groups[0]["lr"], float)
    assert run.step.recorded


def test_obstacles(monkeypatch):
    assert graph_obstacle(torch.device("cpu")) == "the model is on the cpu, expected cuda"
    assert graph_obstacle(torch.device("cuda")) is None
    fake = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2)
    monkeypatch.setattr("nvae_fast.training.graph.dist", fake)
    assert graph_obstacle(torch.device("cuda")) == "there are 2 processes, expected one"
