"""Averaged weights of a checkpoint: what the commands use where there are some."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from nvae_fast import InputError
from nvae_fast.checkpoint.native import EMA, load_model


@pytest.fixture
def averaged(saved):
    """The folder of a model with an average in which every weight is half as large."""
    own = load_model(saved)
    save_file({EMA + name: 0.5 * p.detach() for name, p in own.named_parameters()}, saved / "training.safetensors")
    return saved


def test_the_average_replaces_parameters_and_nothing_else(averaged):
    own, mean = load_model(averaged), load_model(averaged, averaged=True)
    for name, p in own.named_parameters():
        assert torch.equal(mean.get_parameter(name), 0.5 * p)
    assert all(torch.equal(b, mean.get_buffer(name)) for name, b in own.named_buffers())
    assert not mean.training


def test_the_commands_take_it_unless_told_not_to(averaged, cli, tmp_path):
    def score(*flags):
        assert cli("evaluate", averaged, "--num_iw_samples", 1, "--save", tmp_path / "scores", *flags).code == 0
        return json.loads((tmp_path / "scores" / "evaluation.json").read_text())

    mean, own = score(), score("--no-ema")
    assert mean["weights"] != own["weights"] and mean["nelbo"] != own["nelbo"] and score("--ema") == mean
    pictures = {}
    for flag in ("--ema", "--no-ema"):
        assert cli("sample", averaged, "-n", 2, "--out", tmp_path / "s.png", flag).code == 0
        pictures[flag] = (tmp_path / "s.png").read_bytes()
    assert pictures["--ema"] != pictures["--no-ema"]
    (averaged / "training.safetensors").unlink()
    assert score() == own


def test_an_average_of_another_model_is_refused(saved):
    name, p = next(iter(load_model(saved).named_parameters()))
    for tensors in ({EMA + "other": p.detach()}, {EMA + name: torch.zeros(3)}):
        save_file(tensors, saved / "training.safetensors")
        with pytest.raises(InputError, match="of another configuration"):
            load_model(saved, averaged=True)
        load_model(saved)
    save_file({EMA + name: p.detach() + 1}, saved / "training.safetensors")  # the others had no gradient
    assert torch.equal(load_model(saved, averaged=True).get_parameter(name), p + 1)
    (saved / "training.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError, match="is damaged"):
        load_model(saved, averaged=True)
