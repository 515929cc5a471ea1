"""NaN planted in a batch, a gradient, a weight: what becomes of the run, and what it says."""

from __future__ import annotations

import math

import pytest
import torch

from nvae_fast.checkpoint.native import load_training
from nvae_fast.evaluation import Likelihood
from nvae_fast.training import Trainer

NAN = float("nan")


@pytest.fixture
def plant(monkeypatch):
    """plant(function): `function(trainer, x)` is called before every step and may return what to call behind it."""

    def install(function):
        step = Trainer._step

        def planted(self, x):
            undo = function(self, x)
            try:
                step(self, x)
            finally:
                if undo is not None:
                    undo()

        monkeypatch.setattr(Trainer, "_step", planted)

    return install


def events(lines, kind):
    return [line for line in lines if line["event"] == kind]


def test_a_bad_batch_costs_one_step(train, tmp_path, metrics, plant, latest):
    before = {}

    def bad(self, x):
        if self.progress.step == 4:
            before.update({k: v.clone() for k, v in self.model.state_dict().items()})
            x[3, 0, 2, 2] = NAN
        if self.progress.step == 5:
            assert all(torch.equal(v, before[k]) for k, v in self.model.state_dict().items())

    plant(bad)
    assert train(tmp_path / "run").code == 0
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in events(lines, "train")] == list(range(1, 10))
    assert [line["skipped"] for line in events(lines, "train")] == 4 * [0] + 5 * [1]
    (said,) = events(lines, "skipped")
    assert (said["step"], said["where"]) == (5, "the batch") and said["what"].startswith(
        "it holds 1 NaN and 0 infinite of 4096"
    )
    assert all(math.isfinite(line["train_loss"]) for line in events(lines, "valid"))
    tensors, _ = load_training(latest(tmp_path / "run"))
    assert int(tensors["step/skipped"]) == 1 and int(tensors["step/skipped_in_a_row"]) == 0


def test_a_stop_remembers_the_steps_skipped_in_a_row(train, tmp_path, metrics, plant, latest, stop_at):
    def bad(self, x):
        if 4 <= self.progress.step < 6 and not self.progress.rollbacks:
            x.fill_(NAN)

    plant(bad)
    stop_at(5)
    flags = ("--max_skipped", 2, "--resume")
    assert train(tmp_path / "run", *flags).code == 143
    assert int(load_training(latest(tmp_path / "run"))[0]["step/skipped_in_a_row"]) == 1
    stop_at(None)
    assert train(tmp_path / "run", *flags).code == 0
    (back,) = events(metrics(tmp_path / "run"), "rollback")
    assert (back["step"], back["from_step"]) == (5, 6)


def test_a_bad_gradient_costs_one_step(train, tmp_path, metrics, plant):
    def bad(self, x):
        if self.progress.step == 4:
            return self.model.enc0[1].bias.register_hook(lambda grad: grad * math.inf).remove

    plant(bad)
    result = train(tmp_path / "run", "--bar")
    assert result.code == 0 and "step 5 was skipped: non-finite values, first in the gradient of enc0.1.bias" in result.err
    (said,) = events(metrics(tmp_path / "run"), "skipped")
    assert said["step"] == 5 and said["where"] == "the gradient of enc0.1.bias"
    assert "skipped=1" in result.err  # the bar


def test_a_bad_weight_costs_a_rollback(train, tmp_path, metrics, plant, same_run, finished):
    planted = []

    def bad(self, x):
        if self.progress.step == 4 and not planted:
            planted.append(True)
            self.model.image_conditional[1].weight.data[0, 0, 0, 0] = NAN

    plant(bad)
    result = train(tmp_path / "run", "--max_skipped", 2, "--bar")
    assert result.code == 0
    reason = "2 steps in a row up to step 6 had a non-finite loss or gradient"
    said = f"{reason}: back to step 3, rollback 1 of 3, from now on with 0.5 times the learning rate and 2 times lambda"
    assert said in result.err
    lines, plain = metrics(tmp_path / "run"), metrics(finished)
    (back,) = events(lines, "rollback")
    assert (back["step"], back["from_step"], back["reason"]) == (3, 6, reason)
    ours, theirs = events(lines, "train"), events(plain, "train")
    assert [line["step"] for line in ours] == list(range(1, 10)) and ours[:3] == theirs[:3]
    for mine, yours in zip(ours[3:], theirs[3:], strict=True):
        assert mine["lr"] == yours["lr"] / 2 and mine["norm_coeff"] == 2 * max(yours["norm_coeff"], 5e-3)
        assert mine["skipped"] == 2
    assert "skipped: non-finite values, first in the parameter image_conditional.1.weight" in result.err


def test_a_rollback_survives_a_stop(train, tmp_path, plant, same_run, stop_at):
    def bad(self, x):
        if self.progress.step == 4 and not self.progress.rollbacks:
            self.model.image_conditional[1].weight.data[0, 0, 0, 0] = NAN

    plant(bad)
    flags = ("--max_skipped", 2, "--resume")
    assert train(tmp_path / "whole", *flags).code == 0
    for step in (7, 8):
        stop_at(step)
        assert train(tmp_path / "run", *flags).code == 143
    stop_at(None)
    assert train(tmp_path / "run", *flags).code == 0
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("flags", [(), ("--arch_instance", "res_elu")])
def test_back_to_the_beginning(train, tmp_path, metrics, plant, flags, monkeypatch):
    """In the first epoch, with weights that were to be initialised from the first batch."""

    def bad(self, x):
        if self.progress.step == 1 and not self.progress.rollbacks:
            self.model.stem.weight.data.fill_(NAN)

    plant(bad)
    assert train(tmp_path / "run", "--max_skipped", 1, *flags).code == 0
    ours = events(metrics(tmp_path / "run"), "train")
    assert [line["step"] for line in ours] == list(range(1, 10))
    monkeypatch.undo()
    assert train(tmp_path / "plain", *flags).code == 0
    plain = events(metrics(tmp_path / "plain"), "train")
    assert [ours[0][name] for name in ("recon", "kl")] == [plain[0][name] for name in ("recon", "kl")]


def test_it_gives_up(train, tmp_path, metrics, plant, latest, cli):
    def bad(self, x):
        if self.progress.step == 4:
            self.model.stem.weight.data.fill_(NAN)

    plant(bad)
    result = train(tmp_path / "run", "--max_skipped", 1)
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == (
        "nvae-fast: 1 steps in a row up to step 5 had a non-finite loss or gradient, after 3 rollbacks; the last checkpoint "
        "stands: raise --weight_decay_norm or lower --learning_rate; `nvae-fast doctor` looks for the cause"
    )
    _, meta = load_training(latest(tmp_path / "run"))
    assert meta["progress"]["step"] == 3 and meta["progress"]["rollbacks"] == 3
    assert cli("sample", tmp_path / "run", "-n", 1, "--out", tmp_path / "x.png").code == 0


def test_weights_that_are_not_finite_are_not_saved(train, tmp_path, metrics, monkeypatch, latest):
    step = Trainer._step

    def poisoned(self, x):
        step(self, x)
        if self.progress.step == 6 and not self.progress.rollbacks:  # the last step before a checkpoint
            next(self.model.parameters()).data.fill_(math.inf)

    monkeypatch.setattr(Trainer, "_step", poisoned)
    assert train(tmp_path / "run").code == 0
    (back,) = events(metrics(tmp_path / "run"), "rollback")
    assert (back["step"], back["reason"]) == (3, "the weights became infinite or NaN at step 6")


@pytest.mark.parametrize("flags", [(), ("--save_every", 1)])
def test_a_run_too_short_to_notice_that_it_diverged(train, tmp_path, metrics, latest, flags):
    result = train(tmp_path / "run", "--learning_rate", 1e30, *flags)
    assert result.code == 1 and result.err.splitlines()[-1].startswith("nvae-fast: 1 steps in a row up to step 3 were not fin")
    assert "the validation is not either, after 3 rollbacks; the last checkpoint stands" in result.err
    assert load_training(latest(tmp_path / "run"))[1]["progress"]["step"] == (2 if flags else 0)
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()  # which is no JSON


def test_a_validation_that_is_not_finite_is_no_success(train, tmp_path, monkeypatch):
    monkeypatch.setattr("nvae_fast.training.loop.validate", lambda *_: Likelihood(*[NAN] * len(Likelihood._fields)))
    result = train(tmp_path / "run")
    assert result.code == 1 and "done" not in result.err and "trained, but the validation is nan: the weights" in result.err
