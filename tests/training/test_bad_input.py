"""What users get wrong: one line on stderr that names it, exit code 2, no traceback."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def folder(tmp_path, waves):
    """folder(size, mode): a folder of 20 PNGs."""

    def make(height=16, width=16, channels=1):
        path = tmp_path / "pictures"
        path.mkdir()
        for i, image in enumerate(waves(20, height, width, channels)):
            Image.fromarray(image.squeeze(2) if channels == 1 else image).save(path / f"{i:02d}.png")
        return path

    return make


@pytest.fixture
def refuse(refused, command, tmp_path):
    """refuse(parts, *flags): the tiny run with other flags fails so, and makes no folder."""

    def check(parts, *flags):
        line = refused(*parts)(*command(tmp_path / "run", *flags))
        assert not (tmp_path / "run").exists()
        return line

    return check


def test_no_data(refuse, refused, tmp_path):
    refuse([f"{tmp_path}/none does not exist", "--data"], "--data", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    refuse([f"no images in {tmp_path}/empty"], "--data", tmp_path / "empty")
    refused("dataset cifar10 is not bundled", "--data")("train", "--preset", "cifar10", "--out", tmp_path / "run")


def test_a_text_file_among_images(refuse, folder):
    pictures = folder()
    (pictures / "notes.txt").write_text("hello")
    refuse([f"{pictures}/notes.txt is not an image"], "--data", pictures)


def test_a_truncated_picture(refuse, folder):
    pictures = folder()
    content = (pictures / "07.png").read_bytes()
    (pictures / "07.png").write_bytes(content[: len(content) // 2])
    refuse([f"{pictures}/07.png cannot be decoded"], "--data", pictures, "--max_corrupt", 0)


def test_pictures_that_do_not_fit_the_strides(refuse, folder):
    refuse(["18x18 must be divisible by 4", "16 and 20"], "--data", folder(18, 18))
    refuse(["26x26 (with 5 pixels of padding", "24 and 28", "--image-size 18"], "--image_size", 16, "--padding", 5)
    refuse(["'16y16' is no image size"], "--image_size", "16y16")


@pytest.mark.parametrize("command_name", ["evaluate", "reconstruct"])
def test_colours_for_a_grey_model(refused, folder, finished, tmp_path, command_name):
    parts = "images of 3 channel(s), the model takes 1", "'pictures'"
    refused(*parts)(command_name, finished, "--data", folder(16, 16, 3), "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_of_another_configuration(refused, own_copy, exportable, latest, command):
    (latest(own_copy) / "model.safetensors").write_bytes((exportable / "model.safetensors").read_bytes())
    refused("checkpoint of another configuration")("sample", latest(own_copy), "--out", own_copy / "x.png")
    refused("checkpoint of another configuration")(*command(own_copy, "--resume"))


class Malicious:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("argv", [("evaluate",), ("sample",), ("reconstruct",), ("convert", "target")])
def test_a_malicious_checkpoint(refused, tmp_path, monkeypatch, form, argv):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {}, "args": Malicious(tmp_path / "touched")}
    if form == "pickle":
        (tmp_path / "x.pt").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=form == "zip")
    command, *rest = argv
    refused("x.pt")(command, tmp_path / "x.pt", *rest)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"hello\nworld\n", pickle.dumps([1]), b"\x80\x02"])
def test_files_that_are_no_checkpoints(refused, tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    refused("x.pt")("sample", tmp_path / "x.pt", "--out", tmp_path / "x.png")


def test_a_tensor_is_no_checkpoint(refused, tmp_path):
    buffer = io.BytesIO()
    torch.save(torch.zeros(3), buffer)
    (tmp_path / "x.pt").write_bytes(buffer.getvalue())
    refused("is no NVAE checkpoint")("sample", tmp_path / "x.pt", "--out", tmp_path / "x.png")


def test_places_without_a_model(refused, tmp_path, images):
    refused("no checkpoint at", "nowhere")("evaluate", tmp_path / "nowhere")
    refused("holds no model.safetensors")("sample", tmp_path)
    refused("no checkpoint given")("evaluate")
    refused("is no PyTorch checkpoint")("sample", images)


def test_a_run_that_is_not_there(refuse, tmp_path):
    refuse(["nothing to resume at"], "--resume", tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--preset", "cifar"], ["unknown preset 'cifar': did you mean cifar10"]),
        (["--dataset", "cifar"], ["unknown dataset 'cifar': did you mean cifar10"]),
        (["--frobnicate", 3], ["--frobnicate"]),
        (["--num_latent"], ["--num_latent"]),  # no abbreviations
        (["--epochs", 2], ["epochs=2 leaves no cosine decay after warmup_epochs=1", "--epochs 3 or more"]),
        (["--epochs", "many"], ["--epochs", "'many'"]),
        (["--batch_size", 55], ["54 training images", "--batch-size 54 or less"]),
        (["--batch_size", 0], ["batch_size=0 must be at least 1"]),
        (["--learning_rate", "nan"], ["learning_rate=nan must be a finite number"]),
        (["--learning_rate", "1e400"], ["learning_rate=inf must be a finite number"]),
        (["--save_every", -1], ["--save_every=-1 must be at least 0"]),
        (["--device", "banana"], ["unknown device 'banana'", "cpu"]),
        (["--device", "meta"], ["device 'meta' is not supported"]),
        (["--precision", "fp8"], ["fp8", "bf16"]),
        (["--workers", -1], ["workers is -1"]),
        (["--log_every", 0], ["--log_every=0 must be at least 1"]),
        (["--seed", -1], ["'-1' is no seed"]),
        (["--seed", 2**70], ["is no seed: give a whole number from 0 to 4294967295"]),
        (["--kl_balance", "squares"], ["unknown KL balance 'squares': did you mean square"]),
        (["--arch_instance", "res_mbconv5"], ["unknown architecture", "res_mbconv"]),
        (["--num_postprocess_blocks", 2], ["num_postprocess_blocks=2 must be equal"]),
        (["--num_x_bits", 9], ["num_x_bits=9 must be at most 8"]),
        (["--num_process_per_node", 0], ["--num_process_per_node=0 must be at least 1"]),
        (["--node_rank", 2], ["--node_rank=2: expected 0 to 0"]),
        (["--num_proc_node", 2], ["--num_proc_node=2 without --master_address"]),
        (["--local_rank", 1], ["--local_rank=1: ranks are set by torchrun"]),
        (["--keep", 0], ["--keep=0 must be at least 1"]),
        (["--accumulate", 0], ["accumulate=0 must be at least 1"]),
        (["--max_grad_norm", -1], ["max_grad_norm=-1.0 must be at least 0"]),
        (["--likelihood", "gauss"], ["unknown likelihood 'gauss'"]),
        (["--image_size", 100_000], ["image 100000x100000: expected at most 4096 pixels a side"]),
        (["--kl_anneal_portion", 2], ["kl_anneal_portion=2.0 must be at most 1"]),
        (["--kl_const_portion", -1], ["kl_const_portion=-1.0 must be at least 0"]),
        (["--kl_const_coeff", 5], ["kl_const_coeff=5.0 must be at most 1"]),
        (["--num_latent_scales", 9], ["must be divisible by 512", "or fewer --num-latent-scales"]),
        (["--num_latent_scales", 13], ["13 halvings of the image: expected at most 12"]),
        (["--num_latent_scales", 10**9], ["num_latent_scales=1000000000 must be at most 13"]),
        (["--num_groups_per_scale", 10**9], ["num_groups_per_scale=1000000000 must be at most 1000"]),
        (["--num_nf", 10**9], ["num_nf=1000000000 must be at most 1000"]),
        (["--num_channels_enc", 10**9], ["num_channels_enc=1000000000 must be at most 65536"]),
        (["--num_cell_per_cond_enc", 10**9], ["num_cell_per_cond_enc=1000000000 must be at most 1000"]),
        (["--padding", 10**9], ["padding=1000000000 must be at most 2048"]),
        (["--epochs", 10**400], ["must be at most 1000000000"]),
        (["--workers", 10**9], ["workers is 1000000000, expected at most 1024"]),
        (["--shuffle_window", 0], ["--shuffle-window is 0, expected at least 1"]),
        (["--device", "cpu:5"], ["device 'cpu:5' is not supported: use cpu or cuda"]),
        (["--data", ""], ["data is empty ('')"]),
    ],
)
def test_flags_of_training(refuse, flags, parts):
    refuse(parts, *flags)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["sample", "--num_samples", -3], "--num_samples=-3 must be at least 1"),
        (["sample", "--columns", 0], "--columns=0 must be at least 1"),
        (["sample", "--batch_size", -1], "--batch_size=-1 must be at least 1"),
        (["sample", "--temperature", "hot"], "'hot' is no temperature"),
        (["sample", "--temperature", -1], "'-1' is no temperature"),
        (["sample", "--temperature", "nan"], "'nan' is no temperature"),
        (["sample", "--temperature", "1,1,1"], "one per group (2 of them)"),
        (["sample", "--seed", 2**80], "is no seed"),
        (["evaluate", "--num_iw_samples", 0], "--num_iw_samples=0 must be at least 1"),
        (["evaluate", "--num_iw_samples", "all"], "'all'"),
        (["evaluate", "--batch_size", -4], "--batch_size=-4 must be at least 0"),
        (["evaluate", "--eval_mode", "evaluate_fid"], "--inception-weights FILE"),
        (["evaluate", "--eval_mode", "fid"], "--eval_mode fid is not available"),
        (["evaluate", "--eval_mode", "sample", "--num_samples", -1], "--num_samples=-1"),
        (["evaluate", "--limit", 0], "limit is 0"),
        (["evaluate", "--dataset", "waves"], "unknown dataset 'waves'"),
        (["reconstruct", "--num_images", 0], "--num_images=0 must be at least 1"),
        (["reconstruct", "--data", "/nowhere"], "/nowhere does not exist"),
        (["sample", "--device", "cuda:99"], "device 'cuda:99'"),
        (["sample", "--num_samples", 10**9], "1000000000 images take "),
        (["interpolate", "--steps", 10**9], "images take "),
        (["traverse", "--steps", 10**9], "images take "),
        (["sample", "--npz", "x.npy"], "--npz 'x.npy': what is written is npz"),
        (["sample", "--npz", "."], "--npz '.' is a folder"),
        (["evaluate", "--checkpoint", "other"], "--checkpoint 'other' are two models"),
        (["evaluate", "--features", "colours"], "unknown features 'colours'"),
        (["evaluate", "--inception_weights", "nofile"], "file of Inception weights 'nofile' does not exist: give --inc"),
    ],
)
def test_flags_of_the_other_commands(refused, finished, tmp_path, argv, part):
    command, *flags = argv
    refused(part)(command, finished, *flags, "--out", tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["sample"], ["reconstruct"], ["interpolate"], ["traverse"], ["encode"], ["decode", "latents"], ["report"]]
)
def test_pictures_under_the_name_of_another_kind(refused, finished, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    command, *rest = argv
    refused("--out 'x.jpg': what is written is ")(command, finished, *rest, "--out", "x.jpg")
    refused("--out '.' is a folder")(command, finished, *rest, "--out", ".")
    assert not list(tmp_path.iterdir())


def test_results_where_a_file_is(refused, finished, images):
    refused("is a file: give a folder for the results")("evaluate", finished, "--save", images)


def test_other_weights_than_inceptions(refused, finished, latest, tmp_path):
    weights = latest(finished) / "model.safetensors"
    argv = "evaluate", finished, "--metrics", "fd", "--save", tmp_path, "--inception_weights", weights
    refused("holds no weights of the Inception network: it lacks 470 of 470 tensors", "give --inception-weights FILE")(*argv)


def test_a_grid_is_no_wider_than_its_images(cli, finished, tmp_path):
    for command in ("sample", "reconstruct"):
        assert cli(command, finished, "-n", 3, "--columns", 10**9, "--out", tmp_path / "x.png").code == 0
        assert Image.open(tmp_path / "x.png").width == 3 * 66 + 2


def test_conversions(refused, finished, exportable, cli, tmp_path):
    assert cli("convert", exportable, tmp_path / "x.pt").code == 0
    refused("is an official file already")("convert", tmp_path / "x.pt", tmp_path / "y.pt")
    refused("holds a run")("convert", tmp_path / "x.pt", finished)
    refused("is a folder: give the path of the .pt file")("convert", exportable, tmp_path)
    refused("saved in the own format only")("convert", finished, tmp_path / "z.pt")  # of 16x16: the public code has none
    assert {p.name for p in tmp_path.iterdir()} == {"x.pt"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(refuse, refused, finished):
    refuse(["device 'cuda'", "--device cpu"], "--device", "cuda")
    refused("device 'cuda'", "--device cpu")("sample", finished, "--device", "cuda")


def test_several_processes(refuse, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuse(["WORLD_SIZE=2 without RANK in the environment", "torchrun"])


def test_no_command(refused):
    refused("COMMAND")()
    refused("invalid choice: 'trian'")("trian")


def test_images_out_of_range(refuse, tmp_path):
    np.save(tmp_path / "x.npy", np.full((20, 16, 16), 300, np.int64))
    refuse(["x.npy is int64"], "--data", tmp_path / "x.npy")
