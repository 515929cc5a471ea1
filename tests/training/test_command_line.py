"""The public code's command line, and what of it and of our own decides which configuration."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from nvae_fast import PRESETS, NVAEConfig, TrainConfig
from nvae_fast.cli import build_parser, main
from nvae_fast.cli.flags import underscored
from nvae_fast.cli.train import build_config, output_folder
from nvae_fast.data.base import MemorySource
from nvae_fast.training.data import fit_to_data

ALL = "--num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 --use_se --res_dist --fast_adamax"
COLOUR = (
    "--num_preprocess_blocks 1 --num_postprocess_blocks 1 --num_preprocess_cells 2 --num_postprocess_cells 2 "
    "--weight_decay 3e-4 --learning_rate_min 1e-4 --num_mixture_dec 10 --kl_anneal_portion 0.3"
)
ANNEAL = "--weight_decay_norm_anneal --weight_decay_norm_init 1."
FACES = (
    f"{COLOUR} {ANNEAL} --batch_size 4 --num_channels_enc 30 --num_channels_dec 30 --num_latent_scales 5 --ada_groups "
    "--num_groups_per_scale 16 --min_groups_per_scale 4 --num_nf 2 --num_x_bits 5"
)
PUBLISHED = {
    "mnist": "--dataset mnist --batch_size 200 --epochs 400 --num_latent_scales 2 --num_groups_per_scale 10 --ada_groups "
    "--num_preprocess_cells 3 --num_postprocess_cells 3 --num_preprocess_blocks 2 --num_postprocess_blocks 2 "
    "--num_channels_enc 32 --num_channels_dec 32 --num_nf 0 --weight_decay_norm 1e-2",
    "cifar10": f"{COLOUR} --dataset cifar10 --num_channels_enc 128 --num_channels_dec 128 --epochs 400 --batch_size 32 "
    "--num_latent_scales 1 --num_groups_per_scale 30 --num_nf 1 --weight_decay_norm 1e-2 --num_x_bits 8",
    "celeba64": f"{COLOUR} --dataset celeba_64 --num_channels_enc 64 --num_channels_dec 64 --epochs 90 --batch_size 16 "
    "--num_latent_scales 3 --num_groups_per_scale 20 --ada_groups --num_nf 1 --weight_decay_norm 1e-1",
    "imagenet32": f"{COLOUR} {ANNEAL} --dataset imagenet_32 --num_channels_enc 192 --num_channels_dec 192 --epochs 45 "
    "--batch_size 24 --num_latent_scales 1 --num_groups_per_scale 28 --num_nf 1 --weight_decay_norm 1e-2 --warmup_epochs 1",
    "celebahq256": f"{FACES} --dataset celeba_256 --epochs 300 --learning_rate 1e-2 --weight_decay_norm 1e-2",
    "ffhq256": f"{FACES} --dataset ffhq --epochs 200 --learning_rate 8e-3 --weight_decay_norm 1e-1",
}


def config_of(text: str) -> tuple[NVAEConfig, bool]:
    return build_config(build_parser().parse_args(underscored(["train", *text.split()])))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flags_are_the_presets(name):
    config, fit = config_of(f"{ALL} {PUBLISHED[name]} --data /d --root /r --save s --num_proc_node 1 --master_address 1.2.3.4")
    assert not fit and config.training.data == "/d"
    training = dataclasses.replace(config.training, data=PRESETS[name].training.data)
    assert dataclasses.replace(config, name=name, training=training) == PRESETS[name]


def test_no_flags_are_the_demo():
    assert config_of("") == (PRESETS["demo"], True)
    config, fit = config_of("--epochs 7 --compat nvlabs")  # no flags of the public model
    assert fit and config == dataclasses.replace(
        PRESETS["demo"], compat="nvlabs", training=dataclasses.replace(PRESETS["demo"].training, epochs=7)
    )


def test_a_flag_of_the_public_model_brings_its_defaults():
    config, fit = config_of("--use_se")
    training = TrainConfig(dataset="mnist", binarize=True, data="/tmp/nasvae/data")
    expected = NVAEConfig(name="mnist", image_size=(32, 32), padding=2, use_se=True, training=training)
    assert (config, fit) == (expected, False)


def test_spellings():
    config, _ = config_of("--num-channels-enc=64 --num-channels-dec 64 --use-se --no-res-dist --weight-decay-norm=1e-2")
    same, _ = config_of("--num_channels_enc 64 --num_channels_dec=64 --use_se --no_res_dist --weight_decay_norm 1e-2")
    assert config == same and config.use_se and not config.res_dist and config.num_channels_enc == 64
    assert not config_of("--preset cifar10 --no-use-se")[0].use_se
    assert config_of("--preset cifar10 --use_se --no_use_se --use-se")[0].use_se
    assert underscored(["--out-dir=a-b", "c-d", "--", "--e-f"]) == ["--out_dir=a-b", "c-d", "--", "--e-f"]


def test_other_readers_with_flags_of_the_public_model():
    config, fit = config_of("--dataset folder --data /pictures --num_channels_enc 16 --num_channels_dec 16")
    assert fit and config.training.dataset == "folder" and config.name == "folder" and config.num_channels_enc == 16


def test_output_folders():
    def folder(text):
        args = build_parser().parse_args(["train", *text.split()])
        return str(output_folder(args, PRESETS["mnist"]))

    assert folder("--root /r --save s") == "/r/eval-s"
    assert folder("--save s") == "/tmp/nasvae/expr/eval-s"
    assert folder("--root /r") == "/r/eval-exp"
    assert folder("--out o --root /r") == "o"
    assert folder("") == "runs/mnist"


@pytest.fixture
def cifar(tmp_path, waves):
    """A folder like CIFAR-10's, with 40 + 10 images."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rows = waves(60, 32, 32, 3).transpose(0, 3, 1, 2).reshape(60, 3072)
    for i, name in enumerate([f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]):
        part = rows[i * 8 : i * 8 + 8]
        (folder / name).write_bytes(pickle.dumps({b"data": part, b"labels": [0] * len(part)}, protocol=2))
    return folder.parent


def test_the_published_command_line_runs(cli, cifar, tmp_path, metrics):
    """CIFAR-10's, with small numbers."""
    small = (
        "--num_channels_enc 2 --num_channels_dec 2 --num_groups_per_scale 2 --num_latent_per_group 2 --num_preprocess_cells 1 "
        "--num_postprocess_cells 1 --num_cell_per_cond_enc 1 --num_cell_per_cond_dec 1 --epochs 3 --warmup_epochs 1 "
        "--batch_size 20 --num_process_per_node 1"
    )
    flags = f"{ALL} {PUBLISHED['cifar10']} {small} --no-bar --no-images".split()
    where = ["--data", cifar, "--root", tmp_path / "expr", "--save", "id"]
    result = cli("train", *where, *flags)
    run = tmp_path / "expr" / "eval-id"
    assert result.code == 0 and "dmol likelihood, 40 + 8 images of 3x32x32 ('cifar10')" in result.err
    saved = json.loads((run / "config.json").read_text())
    assert saved["num_nf"] == 1 and saved["training"]["flip"] and saved["training"]["dataset"] == "cifar10"
    assert [line["step"] for line in metrics(run)] == [2, 2, 4, 4, 6, 6]
    assert "already holds a run" in cli("train", *where, *flags).err
    again = cli("train", *where, *flags, "--cont_training")
    assert again.code == 0 and "resumed at step 6 of 6" in again.err
    assert cli("evaluate", "--checkpoint", run, "--eval_mode=evaluate", "--num_iw_samples", 2, "--save", tmp_path).code == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 8


@pytest.mark.parametrize(
    ("shape", "flags", "size", "padding", "binarize"),
    [
        ((28, 28, 1), {}, (32, 32), 2, True),
        ((32, 32, 1), {}, (32, 32), 0, True),  # 36 does not suit strides of 8
        ((28, 28, 3), {}, (32, 32), 2, False),
        ((28, 44, 2), {}, (32, 48), 2, False),
        ((28, 40, 1), {}, (28, 40), 0, True),  # fits in neither way: the caller gets the error
        ((32, 32, 3), {"binarize": True}, (32, 32), 0, True),
        ((24, 24, 1), {"padding": 4}, (32, 32), 4, True),
    ],
)
def test_fitting_a_configuration_to_the_data(shape, flags, size, padding, binarize):
    base = dataclasses.replace(PRESETS["demo"], num_latent_scales=2)  # strides of 8
    model = {k: v for k, v in flags.items() if k == "padding"}
    training = dataclasses.replace(base.training, **{k: v for k, v in flags.items() if k == "binarize"})
    base = dataclasses.replace(base, training=training, **model)
    source = MemorySource("x", np.zeros((2, *shape), np.uint8))
    if size[0] % 8:
        with pytest.raises(ValueError, match="must be divisible by 8: the nearest sizes are 24x40 and 32x40"):
            fit_to_data(base, source, flags)
        return
    config = fit_to_data(base, source, flags)
    assert (config.image_size, config.padding, config.training.binarize) == (size, padding, binarize)
    assert config.channels == shape[2] and config.data_size == shape[:2]


def test_flags_from_a_file_and_given_ones_win(tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text("preset: demo\nepochs: 9\nuse-se: false\nlearning_rate: 1e-3\nbatch_size: 7\n")
    argv = underscored(["train", "--batch-size", "5", "--config", str(file)])
    config, _ = build_config(build_parser().parse_args(argv))
    t = config.training
    assert (config.name, t.epochs, config.use_se, t.learning_rate, t.batch_size) == ("demo", 9, False, 1e-3, 5)


@pytest.mark.parametrize(
    "text, words",
    [
        ("epoch: 3", "unrecognized arguments: --epoch=3"),
        ("epochs: [3]", "'epochs' is [3]"),
        ("config: other.yaml", "names another file, 'other.yaml'"),
        ("just words", "holds no 'name: value' lines"),
        ("a: b: c", "is not valid YAML"),
        ("epochs: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_a_bad_file_of_flags_is_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "flags.yaml"
    file.write_text(text)
    assert main(["train", f"--config={file}"]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert main(["train", f"--config={tmp_path}/none.yaml"]) == 2
    assert "No such file" in capsys.readouterr().err
