"""What an exported file holds, and which models and arguments are refused."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nvae_fast import NVAE, PRESETS, InputError, NVAEConfig, TrainConfig, load_nvlabs_checkpoint, save_nvlabs_checkpoint

FLAGS = {  # the public command line: every flag with its type
    "root": str, "save": str, "dataset": str, "data": str, "batch_size": int, "learning_rate": float,
    "learning_rate_min": float, "weight_decay": float, "weight_decay_norm": float, "weight_decay_norm_init": float,
    "weight_decay_norm_anneal": bool, "epochs": int, "warmup_epochs": int, "fast_adamax": bool, "arch_instance": str,
    "kl_anneal_portion": float, "kl_const_portion": float, "kl_const_coeff": float, "num_nf": int, "num_x_bits": int,
    "num_latent_scales": int, "num_groups_per_scale": int, "num_latent_per_group": int, "ada_groups": bool,
    "min_groups_per_scale": int, "num_channels_enc": int, "num_channels_dec": int, "num_preprocess_blocks": int,
    "num_postprocess_blocks": int, "num_preprocess_cells": int, "num_postprocess_cells": int, "num_cell_per_cond_enc": int,
    "num_cell_per_cond_dec": int, "num_mixture_dec": int, "use_se": bool, "res_dist": bool, "cont_training": bool,
    "num_proc_node": int, "node_rank": int, "num_process_per_node": int, "local_rank": int, "global_rank": int,
    "master_address": str, "seed": int, "num_total_iter": int, "distributed": bool,
}  # fmt: skip
KEYS = {"epoch", "state_dict", "optimizer", "global_step", "args", "arch_instance", "scheduler", "grad_scalar"}


def test_own_format_and_back_to_the_official_file_changes_no_bit(official, read, tmp_path):
    official.model().save_pretrained(tmp_path / "own")
    save_nvlabs_checkpoint(NVAE.from_pretrained(tmp_path / "own"), tmp_path / "checkpoint.pt")
    state = read(tmp_path / "checkpoint.pt")["state_dict"]
    assert state.keys() == official.state.keys()
    model = load_nvlabs_checkpoint(tmp_path / "checkpoint.pt")
    assert not model.training
    for exported in (state, _exported(model, tmp_path, read)["state_dict"]):
        for key, tensor in official.state.items():
            assert exported[key].dtype == tensor.dtype and torch.equal(exported[key], tensor), key
            assert exported[key].is_contiguous()
    assert dataclasses.replace(model.config, name="x") == dataclasses.replace(official.config, name="x")


def _exported(model: NVAE, folder: Path, read, **kwargs):
    save_nvlabs_checkpoint(model, folder / "exported.pt", **kwargs)
    return read(folder / "exported.pt")


def test_twins_are_aliases_of_their_weights(official, read, tmp_path):
    state = _exported(official.model(), tmp_path, read)["state_dict"]
    for key in state:
        if key.endswith(".weight_normalized"):
            assert state[key].data_ptr() == state[key.replace("weight_normalized", "weight")].data_ptr()


def test_memory_format_and_mode_do_not_reach_the_file(tiny, read, tmp_path):
    model = tiny.model().to(memory_format=torch.channels_last).train()
    state = _exported(model, tmp_path, read)["state_dict"]
    assert all(torch.equal(state[k], v) and state[k].stride() == v.stride() for k, v in tiny.state.items())
    assert model.training


def test_every_entry_has_its_type(official, read, tmp_path):
    content = _exported(official.model(), tmp_path, read, epoch=2, global_step=14)
    assert content.keys() == KEYS
    assert (content["epoch"], content["global_step"]) == (2, 14)
    assert type(content["epoch"]) is int and type(content["global_step"]) is int
    args = content["args"]
    assert isinstance(args, Namespace)
    assert {k: type(v) for k, v in vars(args).items()} == FLAGS
    assert args.save == f"{args.root}/eval-exp"
    assert args.num_total_iter == 7 * args.epochs
    for name, value in official.flags.items():
        if name not in ("fast_adamax", "num_mixture_dec"):
            assert getattr(args, name) == value, name
    assert args.fast_adamax == (official.flags["num_groups_per_scale"] > 1)  # it fails on a parameter without gradient
    reread = NVAEConfig.from_nvlabs_args(args)
    assert dataclasses.replace(reread, name="x") == dataclasses.replace(official.config, name="x")


def test_arch_instance_is_the_table_of_ops(tiny, read, tmp_path):
    arch = _exported(tiny.model(), tmp_path, read)["arch_instance"]
    wide, thin, plain = ["mconv_e6k5g0"], ["mconv_e3k5g0"], ["res_bnswish", "res_bnswish"]
    assert arch == {
        "normal_enc": wide, "down_enc": wide, "normal_dec": plain, "up_dec": plain, "normal_pre": thin, "down_pre": thin,
        "normal_post": plain, "up_post": plain, "ar_nn": [""],
    }  # fmt: skip


def test_grad_scalar_loads_into_a_scaler(tiny, read, tmp_path):
    state = _exported(tiny.model(), tmp_path, read)["grad_scalar"]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.load_state_dict(state)
    assert scaler.state_dict() == state == torch.amp.GradScaler("cpu", init_scale=2.0**10).state_dict()


def test_args_replace_flags(tiny, read, tmp_path):
    for args in ({"seed": 77, "data": "/d"}, Namespace(seed=77, data="/d")):
        flags = _exported(tiny.model(), tmp_path, read, args=args)["args"]
        assert (flags.seed, flags.data, flags.epochs) == (77, "/d", 200)


def bare(config: NVAEConfig) -> NVAE:
    """A model of the configuration, without the memory."""
    with torch.device("meta"):
        return NVAE(config)


@pytest.mark.parametrize(
    ("config", "dataset"),
    [
        (NVAEConfig(image_size=32, channels=3, training=TrainConfig(dataset="folder")), "cifar10"),
        (NVAEConfig(image_size=32, channels=3, training=TrainConfig(dataset="imagenet_32")), "imagenet_32"),
        (NVAEConfig(image_size=64, channels=3), "celeba_64"),
        (NVAEConfig(image_size=256, channels=3, training=TrainConfig(dataset="ffhq")), "ffhq"),
        (NVAEConfig(image_size=32, channels=3, likelihood="normal"), "cifar10"),
        (NVAEConfig(padding=2, training=TrainConfig(binarize=True, dataset="npz")), "mnist"),
        (PRESETS["demo"], "mnist"),
    ],
)
def test_models_of_own_data_name_the_public_data_set_of_their_shape(config, dataset, read, tmp_path):
    small = dict(num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4, num_latent_per_group=2)
    model = NVAE(dataclasses.replace(config, **small))
    content = _exported(model, tmp_path, read)
    assert content["args"].dataset == dataset
    reread = NVAEConfig.from_nvlabs_args(content["args"])
    for name in ("image_size", "channels", "padding", "output_likelihood", "data_dims", "latent_shapes"):
        assert getattr(reread, name) == getattr(model.config, name)
    load_nvlabs_checkpoint(tmp_path / "exported.pt")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (NVAEConfig(image_size=32), "no data set of 1-channel images"),
        (NVAEConfig(image_size=(64, 32), channels=3), r"images of \(64, 32\)"),
        (NVAEConfig(image_size=64, channels=3, training=TrainConfig(dataset="cifar10", epochs=9)), None),
        (NVAEConfig(image_size=48, channels=3, training=TrainConfig(dataset="cifar10")), r"\(48, 48\)"),
        (NVAEConfig(channels=3, likelihood="bernoulli"), "a bernoulli likelihood"),
        (NVAEConfig(channels=3, likelihood="dmol", num_mixture_dec=1), "output_likelihood=normal"),
        (NVAEConfig(channels=3, arch_instance="res_mbconv9"), "cannot build res_mbconv9"),
        (dataclasses.replace(PRESETS["stacked_mnist"], num_groups_per_scale=2), "padding 2"),
    ],
)
def test_models_that_the_public_code_does_not_know_are_refused_in_one_line(config, words, tmp_path):
    config = dataclasses.replace(config, num_groups_per_scale=2, num_channels_enc=4, num_channels_dec=4)
    if words is None:  # only its data set does not fit
        save_nvlabs_checkpoint(NVAE(config), tmp_path / "x.pt")
        return
    _refused(words, tmp_path, lambda: save_nvlabs_checkpoint(bare(config), tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(epoch=3), "epoch=3 and global_step=0 contradict"),
        (dict(epoch=-1), "epoch=-1"),
        (dict(epoch=5, global_step=4), "contradict"),
        (dict(args={"num_channels_enc": 64, "num_channels_dec": 64}), "num_channels_enc=64 in the public code"),
        (dict(args={"res_dist": False}), "res_dist=False"),
        (dict(args={"dataset": "cifar10"}), "output_likelihood=dmol"),
        (dict(args={"dataset": "cifar"}), "did you mean cifar10"),
    ],
)
def test_contradictions_are_refused_in_one_line(tiny, tmp_path, kwargs, words):
    _refused(words, tmp_path, lambda: save_nvlabs_checkpoint(tiny.model(), tmp_path / "x.pt", **kwargs))


def test_foreign_optimizers_are_refused_in_one_line(tiny, tmp_path):
    model = tiny.model()
    params = list(model.parameters())
    adam = torch.optim.Adam(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    adam.step()
    halves = torch.optim.Adamax([{"params": params[:5]}, {"params": params[5:]}])
    for optimizer in (adam, halves, torch.optim.Adamax(params[::-1]), torch.optim.Adamax(params[1:])):
        save = lambda optimizer=optimizer: save_nvlabs_checkpoint(model, tmp_path / "x.pt", optimizer=optimizer)  # noqa: E731
        _refused("make_optimizer", tmp_path, save)


def test_nowhere_to_write(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "x.pt", tmp_path):
        with pytest.raises(InputError, match="cannot write to") as error:
            save_nvlabs_checkpoint(tiny.model(), target)
        assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    path.write_bytes(b"old")

    def full(content, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        save_nvlabs_checkpoint(tiny.model(), path)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def _refused(words: str, folder: Path, call) -> None:
    with pytest.raises(InputError, match=words) as error:
        call()
    assert "\n" not in str(error.value)
    assert not any(folder.iterdir())
