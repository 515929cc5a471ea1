"""Flags shared by the commands, and those made from the fields of the configuration."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nvae_fast.config import NVAEConfig, TrainConfig
from nvae_fast.errors import InputError

if TYPE_CHECKING:
    import torch

    from nvae_fast.model import NVAE

HELP = {
    "likelihood": "auto, bernoulli, normal or dmol",
    "padding": "zero pixels around the data that the likelihood leaves out",
    "num_x_bits": "bits per channel, 1 to 8",
    "num_mixture_dec": "mixture components of the output; 1: a Normal",
    "arch_instance": "row of the table of cells",
    "num_latent_scales": "latent resolutions",
    "num_groups_per_scale": "latent groups at the largest resolution",
    "num_latent_per_group": "latent channels of a group",
    "ada_groups": "halve the groups from resolution to resolution",
    "min_groups_per_scale": "... but not below this",
    "num_channels_enc": "width at full resolution, bottom-up",
    "num_channels_dec": "width at full resolution, top-down",
    "num_preprocess_blocks": "halvings before the towers",
    "num_postprocess_blocks": "doublings behind them (the same number)",
    "num_preprocess_cells": "cells per such block",
    "num_postprocess_cells": "cells per such block",
    "num_cell_per_cond_enc": "cells per group, bottom-up",
    "num_cell_per_cond_dec": "cells per group, top-down",
    "num_nf": "flow cells per group",
    "use_se": "squeeze-and-excitation in every cell",
    "res_dist": "posterior relative to the prior",
    "compat": "nvlabs: the public code's likelihood and temperature quirks; fixed: without them",
    "epochs": "passes over the training images",
    "warmup_epochs": "epochs of rising learning rate",
    "batch_size": "images per step and process; auto: the largest that fits into memory, up to 1024",
    "learning_rate": "peak rate",
    "learning_rate_min": "rate of the last epoch",
    "weight_decay": "L2 on every parameter",
    "weight_decay_norm": "weight of the spectral and the BN regulariser",
    "weight_decay_norm_init": "its start value when annealed",
    "weight_decay_norm_anneal": "anneal it with the KL coefficient",
    "kl_anneal_portion": "share of the steps over which the KL coefficient rises",
    "kl_const_portion": "share of the steps before that",
    "kl_const_coeff": "floor of the KL coefficient",
    "kl_balance": "equal, linear, sqrt or square",
    "adamax_eps": "epsilon of Adamax",
    "seed": "of weights, order, noise and splits",
    "binarize": "draw binary pixels at every access",
    "flip": "mirror half of the training images",
    "accumulate": "parts that a batch is cut into to save memory; BN and KL balancing then see a part at a time",
    "ema_decay": "average the weights with this decay, for validation, evaluation and samples; 0: do not",
    "max_grad_norm": "scale gradients of a larger norm down to this; 0: never",
}
"""One line for every field of the configuration that has a flag."""

MODEL_FIELDS = [f.name for f in dataclasses.fields(NVAEConfig) if f.name in HELP]
TRAIN_FIELDS = [f.name for f in dataclasses.fields(TrainConfig) if f.name in HELP]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports bad usage as an InputError and knows no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class OnOff(argparse.Action):
    """`--name` sets True, `--no_name` False."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        both = [*option_strings, *(f"--no_{o[2:]}" for o in option_strings)]
        super().__init__(both, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


def underscored(argv: Sequence[str]) -> list[str]:
    """Option names with dashes turned into underscores, `--config FILE` replaced by the flags in the file.

    `--num-nf=1` becomes `--num_nf=1`. Flags of a file come first, right behind the command, so that given ones win.
    """
    out: list[str] = []
    files: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        if token == "--":
            out += [token, *tokens]
            break
        name, equals, value = token.partition("=")
        if name == "--config":
            files += flags_of_file(value if equals else next(tokens, ""))
        else:
            out.append("--" + name[2:].replace("-", "_") + equals + value if token.startswith("--") else token)
    return out[:1] + files + out[1:]


def flags_of_file(path: str) -> list[str]:
    """The flags that a YAML file of `name: value` stands for: `epochs: 3` is `--epochs=3`, `use_se: true` is `--use_se`."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read --config '{path}': {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config '{path}' holds no 'name: value' lines: write flags without their dashes, as 'epochs: 3'")
    flags = []
    for name, value in values.items():
        if name == "config":
            raise InputError(f"--config '{path}' names another file, '{value}': join the two, or give both on the command line")
        if isinstance(value, (dict, list)) or value is None:
            raise InputError(f"--config '{path}': '{name}' is {value!r}: expected one number, word, true or false")
        flag = f"--{str(name).replace('-', '_')}"
        flags.append(f"--no_{flag[2:]}" if value is False else flag if value is True else f"{flag}={value}")
    return flags


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of NVAEConfig and TrainConfig in HELP, None when not given."""
    for title, cls, names in (("model", NVAEConfig, MODEL_FIELDS), ("training", TrainConfig, TRAIN_FIELDS)):
        group = parser.add_argument_group(title, "Without a preset, those of the public code; defaults in brackets.")
        types = {f.name: (f.type, f.default) for f in dataclasses.fields(cls)}
        for name in names:
            kind, default = types[name]
            text = f"{HELP[name]} [{default}]"
            if kind == "bool":
                group.add_argument(f"--{name}", action=OnOff, default=None, help=text)
            else:
                convert = SPECIAL.get(name) or {"int": int, "float": float, "str": str}[kind]
                group.add_argument(f"--{name}", type=convert, help=text)


def add_device_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto: cuda where there is one]")


def add_reading_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--workers", type=int, default=0, help="decoding threads for images on disk [0: choose]")
    parser.add_argument("--max_corrupt", type=int, default=10, help="unreadable images of a split to name and pass over [10]")


def add_data_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """What to train on, and how to read it; `data_options` gives what `open_split` takes of them."""
    kinds = (
        "folder, zip or tar of images, .npy, .npz, IDX, CIFAR-10, TFRecords, LMDBs, or shards 'x-{000..099}.tar' (also URLs)"
    )
    parser.add_argument("--data", help=f"demo, or a path: {kinds}")
    parser.add_argument("--dataset", help="how to read --data [guessed]")
    parser.add_argument("--image_size", type=image_size, metavar="H[xW]", help="resize and crop images to this [as they are]")
    parser.add_argument("--images_per_epoch", type=int, help="of shards [counted, but for URLs without an index]")
    parser.add_argument("--shuffle_window", type=int, default=1000, help="images of shards to shuffle among themselves [1000]")
    add_reading_flags(parser)


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_split` that the data flags stand for."""
    return {
        "image_size": args.image_size, "max_corrupt": args.max_corrupt, "images_per_epoch": args.images_per_epoch,
        "window": args.shuffle_window,
    }  # fmt: skip


def add_seed_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=seed, default=1, help="of the noise [1]")


def seed(text: str) -> int:
    """A seed that every generator takes."""
    if text.isdecimal() and int(text) < 2**32:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no seed: give a whole number from 0 to {2**32 - 1}")


def batch_size(text: str) -> int | str:
    """A number of images, or "auto"."""
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no batch size: give a whole number, or auto") from None


SPECIAL = {"seed": seed, "batch_size": batch_size}
"""How the text of a flag is read where the type of its field does not say."""


def temperatures(text: str) -> float | list[float]:
    """ "0.7", or one number per group, top-down, as "0.7,0.7,1.0"."""
    try:
        values = [float(t) for t in text.split(",")]
        if not all(0 <= t < math.inf for t in values):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is no temperature: give a number from 0 up, as 0.7, or one per group, as 0.7,0.8"
        ) from None
    return values[0] if len(values) == 1 else values


def check_not_empty(args: argparse.Namespace) -> None:
    """InputError for an empty word, which a variable of the shell that is not set leaves behind."""
    for name, value in vars(args).items():
        if value == "":
            raise InputError(f"{name} is empty (''): give it a value, or leave it away")


def check_file(flag: str, path: str | None, suffix: str) -> None:
    """InputError where a flag names a folder, or a file as if it were of another kind than is written."""
    if path is not None and Path(path).is_dir():
        raise InputError(f"{flag} '{path}' is a folder: give the name of a file, as '{Path(path) / f'x{suffix}'}'")
    if path is not None and Path(path).suffix.lower() not in (suffix, ""):
        raise InputError(f"{flag} '{path}': what is written is {suffix[1:]}, so give a name that ends in {suffix}")


def require_at_least_1(args: argparse.Namespace, *names: str) -> None:
    """InputError unless these flags are 1 or more."""
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)} must be at least 1")


def device_of(args: argparse.Namespace) -> torch.device:
    """The torch.device that --device stands for on this machine."""
    import torch

    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device '{name}': use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise InputError(f"device '{name}' is not supported: use cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device '{name}': this machine, or this build of torch, has no CUDA GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device '{name}': there are {torch.cuda.device_count()} GPUs, counted from 0; use --device cuda:0")
    return device


def image_size(text: str) -> tuple[int, int]:
    """ "64" or "64x48" (height x width) as (H, W)."""
    try:
        parts = [int(p) for p in text.lower().split("x")]
        height, width = parts * 2 if len(parts) == 1 else parts
        if min(height, width) > 0:
            return height, width
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is no image size: give 64, or 64x48 for height x width")


def load_model(path: str | Path | None, args: argparse.Namespace) -> NVAE:
    """The model at `path` (run folder, checkpoint folder or official .pt file) on the device of the flags, in eval mode."""
    import torch

    import nvae_fast
    from nvae_fast.checkpoint.native import load_model as load_native

    if path is None:
        raise InputError("no checkpoint given: name a run folder, a checkpoint folder or an official checkpoint.pt")
    device = device_of(args)
    averaged = getattr(args, "ema", True)
    model = nvae_fast.load_nvlabs_checkpoint(path) if Path(path).is_file() else load_native(path, averaged=averaged)
    return model.to(device, memory_format=torch.channels_last)


def with_data(config: NVAEConfig, args: argparse.Namespace) -> NVAEConfig:
    """The configuration reading what --data and --dataset name instead."""
    training = config.training
    if args.data is not None:
        training = dataclasses.replace(training, data=args.data, dataset=data_reader(args.data, args.dataset, training.dataset))
    elif args.dataset is not None:
        training = dataclasses.replace(training, dataset=args.dataset)
    return dataclasses.replace(config, training=training)


def data_reader(data: str, dataset: str | None, usual: str | None) -> str | None:
    """How to read `data`: as asked; else as `usual` if there are LMDBs, which do not say what they hold; else guessed."""
    if dataset is not None:
        return dataset
    from nvae_fast.data.sources import has_stores

    return usual if has_stores(Path(data)) else None
