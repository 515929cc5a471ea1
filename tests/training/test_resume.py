"""A run is a function of its seed: twice the same, and the same when stopped anywhere and taken up again."""

from __future__ import annotations

import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nvae_fast.training import Trainer, loop


def test_one_seed_one_run(train, finished, tmp_path, metrics, same_run):
    assert train(tmp_path / "again").code == 0
    same_run(tmp_path / "again", finished)
    lines = metrics(finished)
    assert [line["event"] for line in lines] == 3 * [*3 * ["train"], "valid"]
    assert {"loss", "recon", "kl", "spectral", "bn"} <= lines[0].keys() and lines[3]["nelbo"] > 0
    assert lines[0]["lr"] == 0 and lines[0]["spectral"] > 0 and lines[0]["bn"] > 0
    assert train(tmp_path / "other", "--seed", 2).code == 0
    assert metrics(tmp_path / "other")[0]["loss"] != lines[0]["loss"]


def test_every_epoch_has_its_own_order_and_noise(train, tmp_path, monkeypatch):
    batches, step = [], Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, x: (batches.append(x), step(self, x))[1])
    assert train(tmp_path / "run").code == 0
    epochs = [torch.cat(batches[i : i + 3]) for i in (0, 3, 6)]
    assert not any(torch.equal(epochs[i], epochs[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert len({tuple(x.flatten().tolist()) for epoch in epochs for x in epoch}) > 120  # of 144: binarised afresh


def test_stopped_after_every_step(train, finished, tmp_path, same_run, stop_at):
    for step in range(1, 10):
        stop_at(step)
        result = train(tmp_path / "run", "--resume", "auto")
        assert result.code == 143 and result.err.endswith("state saved, continue with --resume auto\n"), result
    stop_at(None)
    assert train(tmp_path / "run", "--resume", "auto").code == 0
    same_run(tmp_path / "run", finished)
    result = train(tmp_path / "run", "--resume", "auto")
    assert result.code == 0 and "done before" in result.err
    same_run(tmp_path / "run", finished)


def test_stopped_in_a_validation(train, finished, tmp_path, metrics, same_run, monkeypatch):
    run, validate = tmp_path / "run", loop.validate

    def stopped(trainer, *args):
        trainer.stop.received = signal.SIGINT
        return validate(trainer, *args)

    monkeypatch.setattr(loop, "validate", stopped)
    assert train(run).code == 130
    assert [line["event"] for line in metrics(run)] == 3 * ["train"]

    def killed(*args):  # after the line of the validation, before its checkpoint
        validate(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "validate", killed)
    assert train(run, "--resume").code == 130
    monkeypatch.undo()
    assert train(run, "--resume").code == 0
    same_run(run, finished)


def test_only_the_newest_and_the_best_are_kept(finished, metrics):
    folder = finished / "checkpoints"
    nelbo = {line["step"]: line["nelbo"] for line in metrics(finished) if line["event"] == "valid"}
    best = f"step-{min(nelbo, key=nelbo.get):08d}"
    assert (folder / "latest").read_text() == "step-00000009\n" and (folder / "best").read_text() == f"{best}\n"
    assert {path.name for path in folder.iterdir()} == {"latest", "best", "step-00000009", best}


def test_from_a_checkpoint_into_another_folder(train, finished, tmp_path, metrics, same_run, stop_at):
    stop_at(4)
    assert train(tmp_path / "first").code == 143
    stop_at(None)
    assert train(tmp_path / "second", "--resume", tmp_path / "first").code == 0
    assert metrics(tmp_path / "second") == metrics(finished)[5:]
    shutil.copy(finished / "metrics.jsonl", tmp_path / "second")
    same_run(tmp_path / "second", finished)


def test_no_two_runs_in_one_folder(train, finished, own_copy, stop_at, tmp_path):
    before = (own_copy / "metrics.jsonl").read_bytes()
    result = train(own_copy)
    assert result.code == 2 and "already holds a run: continue it with --resume auto" in result.err
    stop_at(2)
    assert train(tmp_path / "other").code == 143
    stop_at(None)
    result = train(own_copy, "--resume", tmp_path / "other")
    assert result.code == 2 and "already holds another run" in result.err
    assert (own_copy / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused(train, own_copy):
    for flags, part in (
        (["--learning_rate", "0.02"], "training learning_rate=0.007, not 0.02"),
        (["--num_latent_per_group", "3"], "num_latent_per_group=2, not 3"),
    ):
        result = train(own_copy, "--resume", *flags)
        assert result.code == 2 and part in result.err and result.err.count("\n") == 1


def test_other_images_are_refused(cli, command, own_copy, tmp_path, images, latest):
    config = latest(own_copy) / "config.json"
    moved = tmp_path / "waves.npy"
    np.save(moved, np.load(images)[:40])
    config.write_text(config.read_text().replace(str(images), str(moved)))
    result = cli(*command(own_copy, "--resume", "--data", moved))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "does not fit 'waves.npy': 36 images make 2 steps an epoch" in result.err


def test_data_dependent_init(train, tmp_path, same_run, stop_at, metrics):
    flags = ("--arch_instance", "res_elu", "--num_nf", 1, "--epochs", 3)
    assert train(tmp_path / "whole", *flags).code == 0
    for step in (1, 5):
        stop_at(step)
        assert train(tmp_path / "run", *flags, "--resume").code == 143
    stop_at(None)
    assert train(tmp_path / "run", *flags, "--resume").code == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    assert metrics(tmp_path / "run")[0]["bn"] == 0  # no BN in these cells


@pytest.mark.parametrize(
    "flags", [("--ema_decay", 0.8, "--max_grad_norm", 30, "--save_every", 2, "--keep", 3), ("--accumulate", 2)]
)
def test_what_else_a_run_carries(train, tmp_path, same_run, stop_at, metrics, latest, flags):
    assert train(tmp_path / "whole", *flags).code == 0
    for step in (2, 7):
        stop_at(step)
        assert train(tmp_path / "run", *flags, "--resume").code == 143
    stop_at(None)
    assert train(tmp_path / "run", *flags, "--resume").code == 0
    same_run(tmp_path / "run", tmp_path / "whole")
    names = load_file(latest(tmp_path / "run") / "training.safetensors").keys()
    assert any(name.startswith("optimizer/ema/") for name in names) == ("--ema_decay" in flags)
    if "--keep" in flags:
        kept = sorted(p.name for p in (tmp_path / "whole" / "checkpoints").glob("step-*"))
        assert set(kept) >= {"step-00000006", "step-00000008", "step-00000009"} and len(kept) <= 4
        norms = [line["grad_norm"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
        assert max(norms) > 30  # before clipping: it did something


def test_averaged_weights_validate_the_run_and_do_not_disturb_it(train, finished, tmp_path, metrics):
    assert train(tmp_path / "run", "--ema_decay", 0.9).code == 0
    ours, plain = metrics(tmp_path / "run"), metrics(finished)
    events = zip(ours, plain, strict=True)
    assert all((a == b) == (a["event"] == "train") for a, b in events)
