"""Checkpoints that were altered, lost in part or written by an earlier version: they go on, or one line says why not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

STATE, META = "training.safetensors", "training.json"


@pytest.fixture
def half(train, stop_at, tmp_path):
    """A run that was stopped in the middle of its second epoch."""
    stop_at(5)
    assert train(tmp_path / "half").code == 143
    stop_at(None)
    return tmp_path / "half"


def alter(folder, tensors=None, meta=None) -> None:
    if tensors is not None:
        values = load_file(folder / STATE)
        tensors(values)
        save_file(values, folder / STATE)
    if meta is not None:
        values = json.loads((folder / META).read_text())
        meta(values)
        (folder / META).write_text(json.dumps(values))


def first_vectors(values) -> str:
    return next(key for key in values if key.startswith("spectral/"))


@pytest.mark.parametrize(
    ("tensors", "meta", "part"),
    [
        (lambda v: v.update({"random/cpu": v["random/cpu"].float()}), None, "the random state in"),
        (lambda v: v.update({first_vectors(v): torch.zeros(1, 2)}), None, "has shape (1, 2), the model expects"),
        (lambda v: v.pop(first_vectors(v)), None, "it lacks 1 of"),
        (None, lambda v: v["progress"].update(best="low"), "the position in"),
        (None, lambda v: v["progress"].update(step=True), "the position in"),
        (None, lambda v: v.update(progress=[5]), "the position in"),
    ],
)
def test_altered_values(half, latest, refused, command, tensors, meta, part):
    alter(latest(half), tensors, meta)
    refused(part)(*command(half, "--resume"))


def test_a_state_from_before_there_were_several_processes(half, latest, train, same_run, finished):
    """Bit for bit: it had one random state, and the sum of losses in its position."""
    folder = latest(half)
    count = load_file(folder / STATE)["loss"]

    def older(values):
        values["random/cpu"] = values["random/cpu"][0].clone()
        for name in [n for n in values if n == "loss" or n.startswith("step/")]:
            del values[name]

    def position(values):
        del values["processes"], values["progress"]["rollbacks"]
        values["progress"]["loss_sum"] = count[0, 0].item()

    alter(folder, older, position)
    assert train(half, "--resume").code == 0
    same_run(half, finished)


def test_checkpoints_without_the_file_that_names_the_latest(own_copy, refused, command, latest):
    """Starting anew would remove them."""
    newest = latest(own_copy)
    (own_copy / "checkpoints" / "latest").unlink()
    refused(f"holds {newest.name}, but no readable file 'latest'")(*command(own_copy, "--resume"))
    refused(f"holds {newest.name}")(*command(own_copy))
    assert newest.is_dir()


def test_folders_of_the_user_among_the_checkpoints(half, latest, train, same_run, finished):
    mine = shutil.copytree(latest(half), half / "checkpoints" / "step-mine")
    assert train(half, "--resume").code == 0
    assert mine.is_dir()
    same_run(half, finished)


def test_a_log_that_cannot_be_read(half, train):
    (half / "metrics.jsonl").unlink()
    (half / "metrics.jsonl").mkdir()
    result = train(half, "--resume")
    assert (
        result.code == 2 and result.err.splitlines()[-1].startswith("nvae-fast: cannot write to") and "directory" in result.err
    )
