"""Reading official files: old and odd ones load, hostile and damaged ones are refused in one line."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from nvae_fast import NVAE, InputError, NVAEConfig, TrainConfig, load_nvlabs_checkpoint


class Reduced:
    """An object whose pickle calls `function(*args)`."""

    def __init__(self, function, *args) -> None:
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def refused(path: Path, *words: str, **kwargs) -> None:
    with pytest.raises(InputError) as error:
        load_nvlabs_checkpoint(path, **kwargs)
    message = str(error.value)
    assert "\n" not in message and "weights_only" not in message and "add_safe_globals" not in message
    assert all(word in message for word in words), message


def same(model: NVAE, state) -> bool:
    from nvae_fast import to_nvlabs_state_dict

    exported = to_nvlabs_state_dict(model)
    return all(torch.equal(exported[k], v) for k, v in state.items())


@pytest.mark.parametrize("zip_format", (True, False), ids=("zip", "legacy"))
def test_a_plain_official_file_loads(official, write, zip_format):
    path = write(official.state, Namespace(**official.flags), zip_format=zip_format)
    model = load_nvlabs_checkpoint(path)
    assert model.config == official.config and same(model, official.state)


def test_files_without_twins_load(official, write):
    old = {k: v for k, v in official.state.items() if not k.endswith("weight_normalized")}
    model = load_nvlabs_checkpoint(write(old, Namespace(**official.flags)))
    assert same(model, official.state)


def test_twins_of_normalised_convolutions_in_old_files_are_dropped(tiny, write):
    odd = {**tiny.state, "stem.weight_normalized": torch.zeros(2)}
    assert same(load_nvlabs_checkpoint(write(odd, Namespace(**tiny.flags))), tiny.state)


def test_old_files_lack_flags_and_forks_have_more(tiny, write):
    flags = {k: v for k, v in tiny.flags.items() if k not in ("ada_groups", "min_groups_per_scale", "num_mixture_dec")}
    flags |= {"ngpu": 8, "note": "x", "nested": {"a": [1, 2]}, "nothing": None}
    config = load_nvlabs_checkpoint(write(tiny.state, Namespace(**flags))).config
    assert (config.ada_groups, config.min_groups_per_scale, config.num_mixture_dec) == (False, 1, 10)
    assert config == tiny.config


def test_flags_as_a_dict_and_none_for_defaults(tiny, write):
    flags = {**tiny.flags, "min_groups_per_scale": None}
    assert load_nvlabs_checkpoint(write(tiny.state, flags)).config == tiny.config


def _numpy(value):
    kinds = {bool: np.bool_, int: np.int64, float: np.float64}
    return kinds[type(value)](value) if type(value) in kinds else value


@pytest.mark.parametrize("zip_format", (True, False), ids=("zip", "legacy"))
def test_numpy_scalars_become_plain_values(tiny, write, tmp_path, zip_format):
    flags = {k: _numpy(v) for k, v in tiny.flags.items()} | {
        "best": np.float32(1.5),
        "tag": np.str_("x"),
        "half": np.float16(2),
    }
    path = write(tiny.state, Namespace(**flags), zip_format=zip_format, best_loss=np.float64(3.0))
    model = load_nvlabs_checkpoint(path)
    assert model.config == tiny.config
    for part in (model.config, model.config.training):
        assert not any(isinstance(v, np.generic) for v in vars(part).values())
    model.save_pretrained(tmp_path / "own")  # as JSON
    assert NVAE.from_pretrained(tmp_path / "own").config == tiny.config


def test_scalars_pickled_by_numpy_1_load(tiny, write, tmp_path):
    path = write(tiny.state, Namespace(**tiny.flags, best=np.float64(2.5)))
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
        for item in source.namelist():
            target.writestr(item, source.read(item).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_nvlabs_checkpoint(old).config == tiny.config


def test_data_parallel_prefix(tiny, write):
    state = {f"module.{k}": v for k, v in tiny.state.items()}
    assert same(load_nvlabs_checkpoint(write(state, Namespace(**tiny.flags))), tiny.state)


def test_half_precision_weights_load(tiny, write):
    state = {k: v.half() if v.is_floating_point() else v for k, v in tiny.state.items()}
    model = load_nvlabs_checkpoint(write(state, Namespace(**tiny.flags)))
    assert torch.equal(model.prior_ftr0, state["prior_ftr0"].float())


def test_without_args_the_configuration_must_be_given(tiny, write, tmp_path):
    path = write(tiny.state, None)
    refused(path, "holds no 'args'", "config=")
    assert same(load_nvlabs_checkpoint(path, config=tiny.config), tiny.state)
    bare = tmp_path / "bare.pt"
    torch.save(tiny.state, bare)
    refused(bare, "holds no 'args'")
    assert same(load_nvlabs_checkpoint(bare, tiny.config), tiny.state)


def test_trial_runs_shorter_than_their_warm_up_load(tiny, write):
    config = load_nvlabs_checkpoint(write(tiny.state, Namespace(**tiny.flags | {"epochs": 1}))).config
    assert config.training.epochs > config.training.warmup_epochs + 1


HOSTILE = {
    "os.system": (lambda mark: Reduced(os.system, f"touch {mark}"), "posix.system"),
    "eval": (lambda mark: Reduced(eval, f"open({str(mark)!r}, 'w')"), "eval"),
    "exec": (lambda mark: Reduced(exec, f"open({str(mark)!r}, 'w')"), "exec"),
    "open": (lambda mark: Reduced(open, str(mark), "w"), "io.open"),
    "getattr": (lambda mark: Reduced(getattr, "", "join"), "getattr"),
    "path": (lambda mark: mark, f"{type(Path()).__module__}.PosixPath"),
    "class of ours": (lambda mark: TrainConfig(), "nvae_fast.config.TrainConfig"),
    "loader of ours": (lambda mark: Reduced(load_nvlabs_checkpoint, str(mark)), "load_nvlabs_checkpoint"),
    "numpy array": (lambda mark: np.arange(3), "numpy"),
}


@pytest.mark.parametrize("zip_format", (True, False), ids=("zip", "legacy"))
@pytest.mark.parametrize("place", ("args", "nested in args", "state", "elsewhere"))
@pytest.mark.parametrize("kind", HOSTILE)
def test_pickles_that_would_run_code_are_refused(tiny, write, tmp_path, kind, place, zip_format):
    make, named = HOSTILE[kind]
    mark = tmp_path / "mark"
    bad = make(mark)
    state = {"stem.bias": torch.ones(4)}
    args: object = Namespace(dataset="mnist")
    more = {}
    if place == "args":
        args = bad
    elif place == "nested in args":
        args = Namespace(dataset="mnist", deep=[{"a": (1, Namespace(b=bad))}])
    elif place == "state":
        state["stem.weight"] = bad
    else:
        more = {"optimizer": {"state": bad}}
    path = write(state, args, zip_format=zip_format, **more)
    refused(path, "refused to load", named)
    assert not mark.exists() and [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_raw_pickle_is_refused(tmp_path):
    path, mark = tmp_path / "x.pt", tmp_path / "mark"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"state_dict": Reduced(os.system, f"touch {mark}")}, protocol=protocol))
        refused(path, "x.pt")
        assert not mark.exists()


def test_files_that_are_no_checkpoints(tiny, write, tmp_path):
    refused(tmp_path, "is a folder")
    refused(tmp_path / "missing.pt", "no checkpoint at")
    whole = write(tiny.state, Namespace(**tiny.flags)).read_bytes()
    legacy = write(tiny.state, Namespace(**tiny.flags), zip_format=False).read_bytes()
    contents = {
        "empty": b"", "text": b"hello\n", "page": b"<!DOCTYPE html><html></html>", "zeros": bytes(2000),
        "half": whole[: len(whole) // 2], "almost": whole[:-1], "half legacy": legacy[: len(legacy) // 2],
        "head": legacy[:20], "noise": random.Random(0).randbytes(5000),
    }  # fmt: skip
    for name, data in contents.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(data)
        refused(path, f"{name}.pt", "damaged")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "b")
    refused(tmp_path / "other.pt", "damaged")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # taken for a TorchScript archive
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"script/{name}", "3\n")
    refused(tmp_path / "script.pt", "damaged")
    for content in ([1, 2], {}, {"model": {}}, {"state_dict": [1]}, torch.ones(2)):
        torch.save(content, tmp_path / "odd.pt")
        refused(tmp_path / "odd.pt", "no NVAE checkpoint")


def test_a_file_that_may_not_be_read(tiny, write, monkeypatch):
    path = write(tiny.state, Namespace(**tiny.flags))

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", forbidden)
    refused(path, "cannot read", "Permission denied")


def test_any_damage_gives_one_line_or_a_model(tiny, write, tmp_path):
    """Flipped bytes in the pickle part, where they change what is built: never another exception, never a file."""
    legacy = write(tiny.state, Namespace(**tiny.flags), zip_format=False).read_bytes()
    path, rng = tmp_path / "damaged.pt", random.Random(1)
    for _ in range(60):
        data = bytearray(legacy)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(4000)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            load_nvlabs_checkpoint(path, tiny.config)
        except InputError as error:
            assert "\n" not in str(error)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.pt", "damaged.pt"}


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("num_channels_enc", "128", "num_channels_enc is '128'"),
        ("num_channels_enc", [1], "num_channels_enc is [1]"),
        ("num_channels_enc", 4.5, "num_channels_enc is 4.5"),
        ("num_channels_enc", torch.ones(20, 20), "num_channels_enc is tensor("),
        ("num_channels_enc", -3, "at least 1"),
        ("use_se", 2, "use_se is 2"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("epochs", float("inf"), "epochs is inf"),
        ("dataset", ["mnist"], "dataset is ['mnist']"),
        ("dataset", "mnist2", "did you mean mnist"),
        ("arch_instance", {"a": 1}, "arch_instance is"),
        ("arch_instance", "res_mbcon", "did you mean"),
    ],
)
def test_flags_of_the_wrong_kind(tiny, write, flag, value, words):
    refused(write(tiny.state, Namespace(**tiny.flags | {flag: value})), words)


def test_states_of_another_model(tiny, write):
    args = Namespace(**tiny.flags)
    state = dict(tiny.state)
    refused(write({k: v for k, v in state.items() if k != "stem.bias"}, args), "lacks 1 of", "'stem.bias'")
    refused(write({**state, "stem.extra": torch.ones(1)}, args), "unknown 1 of", "'stem.extra'")
    refused(write({**state, "stem.bias": torch.ones(9)}, args), "'stem.bias' has shape (9,)", "expects (4,)")
    refused(write({**state, "stem.bias": [1.0]}, args), "holds a list under 'stem.bias'")
    refused(write({**state, 3: torch.ones(1)}, args), "under '3'")
    refused(write({**state, "stem.bias": torch.ones(4, dtype=torch.int64)}, args), "'stem.bias' is a tensor of torch.int64")
    refused(write({**state, "stem.bias": torch.ones(4).to_sparse()}, args), "'stem.bias'", "sparse")
    refused(write(state, Namespace(**tiny.flags | {"num_channels_enc": 8, "num_channels_dec": 8})), "has shape")


def test_a_refused_state_changes_nothing(tiny):
    model = NVAE(tiny.config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(InputError):
        model.load_nvlabs_state_dict({**tiny.state, "image_conditional.1.bias": torch.ones(7)})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_data_dependent_layers_count_as_initialised_after_import(write):
    from nvae_fast import to_nvlabs_state_dict

    flags = dict(dataset="mnist", arch_instance="res_elu", num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4,
                 num_latent_per_group=2)  # fmt: skip
    state = to_nvlabs_state_dict(NVAE(NVAEConfig.from_nvlabs_args(flags)))
    model = load_nvlabs_checkpoint(write(state, Namespace(**flags)))
    with torch.no_grad():
        model(torch.rand(2, 1, 32, 32))
    assert same(model, state)
