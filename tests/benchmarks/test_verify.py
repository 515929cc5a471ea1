"""The training steps of `bench --suite check`."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.benchmarks import verify
from nvae_fast.cli import main

CPU = torch.device("cpu")


def test_the_step_is_run_twice_in_every_precision(capsys):
    rows = list(verify.verify_steps(CPU))
    assert [row["case"] for row in rows] == ["training_step/fp32", "training_step/bf16"]
    assert all(row["same_bits"] and row["check"] == {"ok": True, "error": 0.0, "budget": 0.0} for row in rows)
    assert main(["bench", "--suite", "check", "--case", "training_step", "--device", "cpu"]) == 0
    assert "2 checks of training_step (auto)" in capsys.readouterr().out


@pytest.mark.parametrize("other", [2, 1, 0])
def test_other_bits_are_seen(monkeypatch, other):
    """Of the first, second or third run of each precision: the one that all are held to, and the two that are compared."""
    plain, calls = verify._trained, []

    def faulty(*args, **options):
        calls.append(None)
        found = plain(*args, **options)
        return [*found[:-1], found[-1] + 1] if (len(calls) - 1) % 3 == other else found

    monkeypatch.setattr(verify, "_trained", faulty)
    for row in verify.verify_steps(CPU):
        assert row["check"]["ok"] == (other == 2) and row["same_bits"] == (other == 0)
        assert ("a second run has other bits" in verify.line(row)) == (other != 0)


def test_a_loss_that_is_not_finite_is_seen(monkeypatch):
    monkeypatch.setattr(verify, "_trained", lambda *args, **options: [torch.tensor([1.0, torch.nan])])
    for row in verify.verify_steps(CPU):
        assert not row["check"]["ok"] and row["check"]["error"] is None and "not finite" in verify.line(row)


def test_a_graph_that_was_not_recorded_is_seen(capsys):
    assert verify._trained(CPU, "fp32", graph=True)[0][-1].isnan()
    assert "the step runs without a CUDA graph: the model is on the cpu" in capsys.readouterr().err
