"""Checkpoints of the public NVAE code, in and out: key names, optimiser state, and a loader that runs no code."""

from __future__ import annotations

import os
import pickle
import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvae_fast.cells import ARCHITECTURES, ActConv, UpsampleProject
from nvae_fast.checkpoint.files import atomic_write, check_keys
from nvae_fast.config import NVLABS_DATASETS, NVAEConfig
from nvae_fast.data import DATASETS
from nvae_fast.errors import InputError
from nvae_fast.flows import AutoregressiveShift
from nvae_fast.layers import InvertedResidual, SqueezeExcite, WeightNormConv2d
from nvae_fast.model import NVAE
from nvae_fast.optim import make_optimizer

# Our names of a module's parts -> official ones, by the class that owns them. An inverted residual counts from 1 when it
# begins with an up-sampling layer.
_INVERTED = {"bn_in": "conv.{0}.bn", "expand": "conv.{1}.conv.0", "bn_expand": "conv.{1}.conv.1",
             "depthwise": "conv.{2}.conv.0", "bn_depthwise": "conv.{2}.conv.1", "project": "conv.{3}",
             "bn_out": "conv.{4}.bn"}  # fmt: skip
_PARTS: dict[type, dict[str, str]] = {
    AutoregressiveShift: {"conv_in": "conv.convz.0", "depthwise": "conv.convz.2", "conv_out": "mu.conv_0"},
    SqueezeExcite: {"reduce": "se.0", "expand": "se.2"},
    UpsampleProject: {"conv": "1"},
}
TWIN = "weight_normalized"
"""Convolutions without weight norm carry a copy of `weight` under this name in official files."""


def official_module_names(model: nn.Module) -> dict[str, str]:
    """Official name of every module in `model` (an NVAE or a part of one) that owns parameters, by our name."""
    modules = dict(model.named_modules())
    names = {}
    for name, module in modules.items():
        if not list(module.parameters(recurse=False)):
            continue
        parent, _, leaf = name.rpartition(".")
        owner = modules[parent]
        if isinstance(owner, InvertedResidual):
            first = 1 if owner.upsample else 0
            leaf = _INVERTED[leaf].format(*range(first, first + 5))
        elif isinstance(owner, ActConv):
            bn = "bn.bn" if owner.act == "elu" else "bn_act"
            leaf = {"bn": bn, "conv": "conv_0"}[leaf]
        else:
            leaf = _PARTS.get(type(owner), {}).get(leaf, leaf)
        names[name] = re.sub(r"(^|\.)ops\.", r"\1_ops.", f"{parent}.{leaf}" if parent else leaf)
    return names


def to_nvlabs_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the public code's key names, `weight_normalized` twins included."""
    names = official_module_names(model)
    modules = dict(model.named_modules())
    out: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        official = names.get(owner, owner)
        out[f"{official}.{leaf}" if owner else key] = tensor
        if leaf == "weight" and isinstance(modules[owner], nn.Conv2d) and not isinstance(modules[owner], WeightNormConv2d):
            out[f"{official}.{TWIN}"] = tensor
    return out


def from_nvlabs_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load official keys into `model`; every key but the optional twins must be there with its shape (InputError if not)."""
    wanted = to_nvlabs_state_dict(model)
    given = {k.removeprefix("module."): v for k, v in state_dict.items()}
    check_keys(
        {k: v for k, v in wanted.items() if not k.endswith(TWIN)},
        {k: v for k, v in given.items() if not k.endswith(TWIN)},
    )
    names = official_module_names(model)
    ours = {}
    for key in model.state_dict():
        owner, _, leaf = key.rpartition(".")
        ours[key] = given[f"{names.get(owner, owner)}.{leaf}" if owner else key]
    model.load_state_dict(ours)


def read_nvlabs_file(path: str | Path) -> dict[str, Any]:
    """The dict in an official checkpoint file, tensors on the CPU. A pickle that would run code is refused (InputError).

    Allowed beside tensors and plain containers: argparse.Namespace and numpy scalars.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no checkpoint at '{path}': give the path of a checkpoint.pt")
    allowed = [Namespace, np.dtype, np._core.multiarray.scalar]
    allowed += [type(np.dtype(t)) for t in ("f4", "f8", "i4", "i8", "u1", "?")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) `?([\w.]+)`?", str(error))
        what = f"it names '{found[1]}'" if found else "it is not a plain PyTorch checkpoint"
        raise InputError(f"refused to load '{path}': {what}, which could run code; only tensors and flags are read") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot read '{path}' as a PyTorch checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or "state_dict" not in content:
        raise InputError(f"'{path}' is no NVAE checkpoint: expected a dict with 'state_dict' and 'args'")
    return content


def load_nvlabs_checkpoint(path: str | Path, config: NVAEConfig | None = None) -> NVAE:
    """The model in an official file, in eval mode. `config` is needed only for files without `args`."""
    content = read_nvlabs_file(path)
    if config is None:
        if not isinstance(content.get("args"), (Namespace, Mapping)):
            raise InputError(f"'{path}' holds no 'args': pass the configuration it was trained with")
        config = NVAEConfig.from_nvlabs_args(content["args"])
    model = NVAE(config)
    from_nvlabs_state_dict(model, content["state_dict"])
    return model.eval()


def save_nvlabs_checkpoint(model: NVAE, path: str | Path, *, optimizer: torch.optim.Optimizer | None = None,
                           scheduler: Mapping[str, Any] | None = None, epoch: int = 0, global_step: int = 0,
                           args: Namespace | Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Write a file that the public code loads strictly: every key of its checkpoints, twins and `args` included.

    `optimizer` (Adamax over `model.parameters()`; a fresh one if None) goes in with integer steps. `epoch` is the last
    finished epoch + 1. `args` overrides the flags derived from `model.config`.
    """
    flags = to_nvlabs_args(model.config) | dict(vars(args) if isinstance(args, Namespace) else args or {})
    training = model.config.training
    optimizer = optimizer or make_optimizer(model)
    state = optimizer.state_dict()
    state["state"] = {
        i: {k: int(v) if k == "step" else v.detach().cpu().clone() for k, v in s.items()} for i, s in state["state"].items()
    }
    rate = optimizer.param_groups[0]["lr"]
    content = {
        "epoch": int(epoch),
        "state_dict": {k: v.detach().cpu().clone() for k, v in to_nvlabs_state_dict(model).items()},
        "optimizer": state,
        "global_step": int(global_step),
        "args": Namespace(**flags),
        "arch_instance": nvlabs_arch(model.config.arch_instance),
        "scheduler": dict(scheduler) if scheduler is not None else cosine_state(training, rate, epoch),
        "grad_scalar": {"scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                        "_growth_tracker": 0},
    }  # fmt: skip
    atomic_write(path, lambda file: torch.save(content, file))


def cosine_state(training, rate: float, epoch: int) -> dict[str, Any]:
    """The state of torch's CosineAnnealingLR after the epochs that the public code steps it in."""
    steps = max(epoch - 1 - training.warmup_epochs, 0)
    return {"T_max": float(training.epochs - training.warmup_epochs - 1), "eta_min": training.learning_rate_min,
            "base_lrs": [training.learning_rate], "last_epoch": steps, "_step_count": steps + 1, "_is_initial": False,
            "_get_lr_called_within_step": False, "_last_lr": [rate]}  # fmt: skip


def nvlabs_arch(name: str) -> dict[str, list[str]]:
    """The table of ops by cell type, as official files carry it."""
    places = ARCHITECTURES[name]
    kinds = {"enc": "down", "dec": "up", "pre": "down", "post": "up"}
    return {f"{kind}_{place}": list(ops) for place, ops in places.items() for kind in ("normal", kinds[place])} | {
        "ar_nn": [""]
    }


def to_nvlabs_args(config: NVAEConfig) -> dict[str, Any]:
    """The public code's flags for `config`, with its defaults for what we do not use."""
    t = config.training
    dataset = t.dataset if t.dataset in NVLABS_DATASETS else nearest_dataset(config)
    own = {"name", "image_size", "channels", "padding", "likelihood", "compat", "training"}
    model = {k: v for k, v in config.to_dict().items() if k not in own}
    training = {k: v for k, v in config.to_dict()["training"].items()
                if k not in ("kl_balance", "adamax_eps", "data", "dataset", "binarize", "flip")}  # fmt: skip
    paths = {"root": os.path.join(os.sep, "tmp", "nasvae", "expr"), "save": "exp", "data": str(t.data)}
    processes = {"num_proc_node": 1, "node_rank": 0, "num_process_per_node": 1, "local_rank": 0, "global_rank": 0,
                 "master_address": "127.0.0.1", "distributed": False}  # fmt: skip
    return {**paths, "dataset": dataset, **model, **training, "fast_adamax": True, "cont_training": False,
            "num_total_iter": 0, **processes}  # fmt: skip


def nearest_dataset(config: NVAEConfig) -> str:
    """The public `--dataset` whose network has the shape of `config`; InputError if the public code has none."""
    for name, channels in NVLABS_DATASETS.items():
        data = DATASETS[name]
        same = (data.side, data.side) == config.image_size and channels == config.channels and data.padding == config.padding
        if same and data.binarize == (config.output_likelihood == "bernoulli"):
            return name
    raise InputError(
        f"the public code has no data set of {config.channels}-channel images of {config.image_size} with padding "
        f"{config.padding} and a {config.output_likelihood} likelihood: this model can be saved in the own format only"
    )
