"""BN statistics for a temperature: kept beside the checkpoint while they fit, and never NaN."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvae_fast import readjust
from nvae_fast.checkpoint.native import load_model
from nvae_fast.readjust import fingerprint, readjust_bn, readjust_bn_cached


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by one with every re-adjustment that is computed."""
    calls = []
    monkeypatch.setattr(readjust, "readjust_bn", lambda *a, **k: calls.append(k["temperature"]) or readjust_bn(*a, **k))
    return calls


def adjusted(folder, temperature=0.5, **options):
    model = load_model(folder)
    said = readjust_bn_cached(model, folder, temperature=temperature, iterations=3, batch_size=2, **options)
    return model, said


def test_kept_beside_the_checkpoint(saved, passes):
    first, said = adjusted(saved)
    assert passes == [0.5] and "kept in" in said and (saved / "bn-t0.5.safetensors").is_file()
    second, said = adjusted(saved)
    assert passes == [0.5] and f"from {saved / 'bn-t0.5.safetensors'}" in said
    assert same(state(first), state(second)) and not same(state(first), state(load_model(saved)))
    adjusted(saved, 0.25)
    adjusted(saved, [0.5, 0.5, 0.4])
    assert passes == [0.5, 0.25, [0.5, 0.5, 0.4]] and len(list(saved.glob("bn-t*.safetensors"))) == 3
    adjusted(saved, seed=1)
    assert len(passes) == 4  # other noise
    with safe_open(saved / "bn-t0.5.safetensors", framework="pt") as file:
        assert file.metadata()["seed"] == "1"


def test_other_weights_make_it_anew(saved, passes):
    adjusted(saved)
    model = load_model(saved)
    before = fingerprint(model)
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1e-3
    assert fingerprint(model) != before
    model.save_pretrained(saved)
    adjusted(saved)
    assert passes == [0.5, 0.5]
    adjusted(saved)
    assert passes == [0.5, 0.5]


@pytest.mark.parametrize("damage", ["cut", "nan", "negative", "names"])
def test_a_damaged_file_is_made_anew(saved, passes, damage):
    good, _ = adjusted(saved)
    file = saved / "bn-t0.5.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as stored:
        about = stored.metadata()
    name = next(k for k in tensors if k.endswith("running_var"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "names":
        save_file({k: v for k, v in tensors.items() if k != name}, file, about)
    else:
        tensors[name][0] = torch.nan if damage == "nan" else -1.0
        save_file(tensors, file, about)
    again, _ = adjusted(saved)
    assert passes == [0.5, 0.5] and same(state(good), state(again))


def test_a_place_that_cannot_be_written_to_costs_only_time(saved, passes):
    (saved / "bn-t0.5.safetensors").mkdir()
    model, said = adjusted(saved)
    assert "not kept: cannot write" in said and not same(state(model), state(load_model(saved)))


@pytest.mark.parametrize("name, value", [("bias", torch.nan), ("bias", torch.inf), ("log_weight_norm", 60.0)])
def test_nan_statistics_are_put_back(saved, name, value):
    """A convolution that makes the statistics of the layers behind it NaN, infinite, or of a variance that overflows."""
    model = load_model(saved)
    with torch.no_grad():
        getattr(model.dec_tower[0].conv, name).view(-1)[0] = value
    before = state(model)
    assert not readjust_bn(model, temperature=0.5, iterations=4, batch_size=2)
    assert not model.training
    assert all(torch.equal(v, before[k]) for k, v in state(model).items() if "running" in k or "tracked" in k)
    said = readjust_bn_cached(model, saved, temperature=0.5, iterations=4, batch_size=2)
    assert "NaN or infinite" in said and "original" in said and not (saved / "bn-t0.5.safetensors").exists()


def test_the_command_says_what_it_did(saved, cli, tmp_path):
    argv = ("sample", saved, "-n", 4, "--temp", 0.5, "--readjust-bn", "--readjust_passes", 3, "--out", tmp_path / "a.png")
    first = cli(*argv)
    assert first.code == 0 and "re-adjusted to temperature 0.5 in 3 passes, kept in" in first.err
    picture = (tmp_path / "a.png").read_bytes()
    again = cli(*argv)
    assert again.code == 0 and "BN statistics for temperature 0.5 from" in again.err
    assert (tmp_path / "a.png").read_bytes() == picture
    assert cli(*argv[:-1], tmp_path / "b.png", "--no-readjust-bn").code == 0
    assert (tmp_path / "b.png").read_bytes() != picture


def test_an_interruption_leaves_the_statistics_alone(make, monkeypatch):
    model = make()
    before, calls, sample = state(model), [], model.sample

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    monkeypatch.setattr(model, "sample", stopping)
    with pytest.raises(KeyboardInterrupt):
        readjust_bn(model, temperature=0.5)
    assert same(state(model), before) and not model.training
