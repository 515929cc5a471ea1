"""Runs that do not fit into memory are refused before they begin; --batch_size auto takes the largest batch that fits."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from nvae_fast import PRESETS
from nvae_fast.checkpoint.native import read_config
from nvae_fast.estimate import Tracer
from nvae_fast.training import fit

MIB = 2**20


@pytest.fixture
def machine(monkeypatch):
    """machine(bytes): what there is for training."""
    return lambda size: monkeypatch.setattr(fit, "available_memory", lambda device: size / fit.SHARE)


@pytest.fixture
def no_trace(monkeypatch):
    monkeypatch.setattr(fit, "Tracer", lambda *a, **k: pytest.fail("a run that surely fits was traced"))


@pytest.mark.parametrize("changes", [{}, {"num_nf": 1, "num_channels_enc": 8}, {"num_latent_scales": 1, "binarize": False}])
def test_the_bound_is_above_what_a_step_takes(changes):
    demo, changes = PRESETS["demo"], dict(changes)
    training = dataclasses.replace(demo.training, binarize=changes.pop("binarize", True))
    small = {"image_size": (16, 16), "padding": 0, "num_channels_enc": 4, "num_channels_dec": 4, "num_groups_per_scale": 1}
    config = dataclasses.replace(demo, training=training, **small | changes)
    found, (fixed, each) = Tracer(config).footprint("fast", 4), fit.bound(config)
    assert found.weights + found.gradients + found.optimizer < fixed and found.per_image < each


def test_a_run_that_surely_fits_is_not_traced(train, tmp_path, no_trace):
    assert train(tmp_path / "run", "--epochs", 2, "--warmup_epochs", 0).code == 0


def test_a_run_that_does_not_fit(refused, command, tmp_path, machine):
    machine(2 * MIB)
    flags = ("--batch_size", 54)
    line = refused("a step on 54 images takes", "--memory balanced", "--batch_size ", "or less")(*command(tmp_path, *flags))
    assert not list(tmp_path.iterdir())
    most = int(line.split("--batch_size ")[1].split()[0])
    assert 0 < most < 54
    machine(MIB // 8)
    refused("a smaller model: one image alone does not fit")(*command(tmp_path, *flags))


def test_batch_size_auto(train, refused, command, tmp_path, machine, latest):
    def batch(run) -> int:
        return json.loads((latest(run) / "config.json").read_text())["training"]["batch_size"]

    auto = ("--batch_size", "auto", "--epochs", 2, "--warmup_epochs", 0)
    result = train(tmp_path / "all", *auto)
    assert result.code == 0 and "--batch_size auto: 54\n" in result.err and batch(tmp_path / "all") == 54  # the whole set
    machine(2 * MIB)
    assert train(tmp_path / "few", *auto).code == 0
    chosen = batch(tmp_path / "few")
    assert 1 <= chosen < 54
    config = read_config(latest(tmp_path / "few"))
    assert Tracer(config).footprint("balanced", chosen).peak <= 2 * MIB < Tracer(config).footprint("balanced", 54).peak
    machine(64 * MIB)  # the batch of the run stays
    assert train(tmp_path / "few", *auto, "--resume").code == 0
    machine(MIB // 8)
    refused("--batch_size auto: not one image")(*command(tmp_path / "none", *auto))
    refused("'many' is no batch size")(*command(tmp_path / "none", "--batch_size", "many"))


def test_memory_that_runs_out_is_one_line(cli, command, tmp_path, monkeypatch):
    from nvae_fast.training import Trainer

    for error in (MemoryError("12 TiB"), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")):
        monkeypatch.setattr(Trainer, "_step", lambda *_, error=error: (_ for _ in ()).throw(error))
        result = cli(*command(tmp_path / type(error).__name__))
        assert result.code == 1 and "out of memory (" in result.err and "--memory low" in result.err.splitlines()[-1]
