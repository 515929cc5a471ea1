"""Checkpoints of the public NVAE code, in and out: key names, optimiser state, and a loader that runs no code."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from nvae_fast.cells import ARCHITECTURES, ActConv, UpsampleProject
from nvae_fast.checkpoint.files import atomic_write, check_keys
from nvae_fast.config import NVLABS_DATASETS, NVAEConfig, TrainConfig
from nvae_fast.data import DATASETS
from nvae_fast.errors import InputError
from nvae_fast.flows import AutoregressiveShift
from nvae_fast.layers import InvertedResidual, SqueezeExcite, WeightNormConv2d
from nvae_fast.model import NVAE
from nvae_fast.objective import learning_rate
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

_SCALAR = np.float64(0).__reduce__()[0]
_SAFE = [Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdU"},
         *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core"))]  # fmt: skip
"""What a file may name beside tensors and plain containers: Namespace and numpy scalars (of numpy 1 and 2)."""

_KINDS = {"int": int, "float": float, "bool": bool}


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
    names, modules = official_module_names(model), dict(model.named_modules())
    out: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        official = names.get(owner, owner)
        out[f"{official}.{leaf}" if owner else key] = tensor
        if leaf == "weight" and isinstance(modules[owner], nn.Conv2d) and not isinstance(modules[owner], WeightNormConv2d):
            out[f"{official}.{TWIN}"] = tensor
    return out


def from_nvlabs_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load official keys into `model`; every key but the optional twins must be there with its shape (InputError if not).

    On an error the model is left as it was. A `module.` in front of all keys is dropped.
    """
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise InputError(f"the state dict holds a {type(value).__name__} under '{key}': expected tensors by name")
    given = {k.removeprefix("module."): v for k, v in state_dict.items() if not k.endswith(f".{TWIN}")}
    wanted = {k: v for k, v in to_nvlabs_state_dict(model).items() if not k.endswith(f".{TWIN}")}
    check_keys(wanted, given)
    for key, tensor in given.items():
        if tensor.layout != torch.strided or tensor.is_floating_point() != wanted[key].is_floating_point():
            raise InputError(
                f"'{key}' is a tensor of {tensor.dtype} ({tensor.layout}): expected a plain one of {wanted[key].dtype}; "
                "convert it before saving the checkpoint"
            )
    names, ours = official_module_names(model), {}
    for key in model.state_dict():
        owner, _, leaf = key.rpartition(".")
        ours[key] = given[f"{names.get(owner, owner)}.{leaf}" if owner else key]
    model.load_state_dict(ours)


def read_nvlabs_file(path: str | Path) -> dict[str, Any]:
    """The dict in an official checkpoint file, tensors on the CPU. A pickle that would run code is refused (InputError).

    Allowed beside tensors and plain containers: argparse.Namespace and numpy scalars. A file that is nothing but a state
    dict comes back as {"state_dict": ...}.
    """
    path = Path(path)
    if not path.is_file():
        what = f"'{path}' is a folder" if path.is_dir() else f"no checkpoint at '{path}'"
        raise InputError(f"{what}: give the path of an official checkpoint.pt")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE):
            warnings.simplefilter("ignore")  # about formats that are then refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file provokes
        if isinstance(error, OSError) and error.filename:  # else from a seek that a damaged file asked for
            raise InputError(f"cannot read '{path}': {error.strerror}") from None
        # torch's own advice, to switch the check off, is not passed on
        if found := re.search(r"GLOBAL (\w+(?:\.\w+)*) (?:was not|whose module)", str(error)):
            raise InputError(
                f"refused to load '{path}': it names '{found[1]}', which could run code; only tensors and flags are read"
            ) from None
        raise InputError(f"'{path}' is no PyTorch checkpoint, or is damaged: get it again, or use another one") from None
    if isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
        content = {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise InputError(f"'{path}' is no NVAE checkpoint: expected a dict with 'state_dict' and 'args'")
    return content


def load_nvlabs_checkpoint(path: str | Path, config: NVAEConfig | None = None) -> NVAE:
    """The model in an official file, in eval mode. `config` is needed only for files without `args`."""
    content = read_nvlabs_file(path)
    if config is None:
        if not isinstance(content.get("args"), (Namespace, Mapping)):
            raise InputError(f"'{path}' holds no 'args': pass the configuration it was trained with as config=NVAEConfig(...)")
        config = NVAEConfig.from_nvlabs_args(_plain_flags(content["args"]))
    model = NVAE(config)
    from_nvlabs_state_dict(model, content["state_dict"])
    return model.eval()


def _plain_flags(args: Namespace | Mapping[str, Any]) -> dict[str, Any]:
    """The flags of a file as plain Python values of the types of our fields (InputError if one is not)."""
    kinds = {f.name: str(f.type) for cls in (NVAEConfig, TrainConfig) for f in dataclasses.fields(cls)}
    flags = {}
    for name, value in dict(vars(args) if isinstance(args, Namespace) else args).items():
        value = value.item() if isinstance(value, np.generic) else value
        kind, ok = kinds.get(name, ""), True
        if kind in _KINDS and value is not None:
            ok = isinstance(value, (int, float)) and math.isfinite(value) and _KINDS[kind](value) == value
            value = _KINDS[kind](value) if ok else value
        elif kind.startswith("str") and value is not None:
            ok = isinstance(value, str)
        if not ok:
            shown = " ".join(repr(value).split())[:60]
            raise InputError(f"the checkpoint's flag {name} is {shown}: expected a value of type {kind}; pass config= instead")
        flags[name] = value
    if (epochs := flags.get("epochs", 200)) <= flags.get(
        "warmup_epochs", 5
    ) + 1:  # a trial run, whose rates we would not train with
        flags |= {"epochs": max(epochs, 2), "warmup_epochs": 0}
    return flags


def save_nvlabs_checkpoint(model: NVAE, path: str | Path, *, optimizer: torch.optim.Optimizer | None = None,
                           scheduler: LRScheduler | Mapping[str, Any] | None = None, epoch: int = 0, global_step: int = 0,
                           args: Namespace | Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Write a file that the public code loads strictly: every key of its checkpoints, twins and `args` included.

    Args:
        optimizer: Adamax over `model.parameters()` (None: a fresh one); its steps are written as integers.
        scheduler: a CosineAnnealingLR or its state. None: the state at `epoch`, and once an epoch is done the rate of that
            epoch in the optimiser state, so that training resumed there follows the schedule whatever the optimiser holds.
        epoch: the last finished epoch + 1. global_step: steps done.
        args: flags that replace those derived from `model.config`.

    Raises:
        InputError: the public code has no such model or data set, or the arguments contradict each other.
    """
    flags = to_nvlabs_args(model.config) | dict(vars(args) if isinstance(args, Namespace) else args or {})
    training = _check_flags(model.config, flags)
    if not 0 <= epoch <= global_step:
        raise InputError(f"epoch={epoch} and global_step={global_step} contradict each other: an epoch takes a step or more")
    steps = flags["num_total_iter"] // training.epochs or (global_step // epoch if epoch else 0)  # per epoch
    flags["num_total_iter"] = steps * training.epochs
    state = _optimizer_state(optimizer or make_optimizer(model), model)
    group = state["param_groups"][0]
    if isinstance(scheduler, LRScheduler):
        scheduler = scheduler.state_dict()
    elif scheduler is None:
        if epoch:
            group["lr"] = learning_rate(epoch * steps - 1, steps, training)
        scheduler = cosine_state(training, group["lr"], epoch)
    group.setdefault("initial_lr", training.learning_rate)  # a scheduler made after loading needs it
    tensors = to_nvlabs_state_dict(model)
    copies = {id(v): _copy(v) for v in tensors.values()}  # a twin shares the storage of its weight
    content = {
        "epoch": int(epoch),
        "state_dict": {k: copies[id(v)] for k, v in tensors.items()},
        "optimizer": state,
        "global_step": int(global_step),
        "args": Namespace(**flags),
        "arch_instance": nvlabs_arch(model.config.arch_instance),
        "scheduler": dict(scheduler),
        "grad_scalar": {"scale": 2.0**10, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                        "_growth_tracker": 0},
    }  # fmt: skip
    atomic_write(path, lambda file: torch.save(content, file))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _optimizer_state(optimizer: torch.optim.Optimizer, model: NVAE) -> dict[str, Any]:
    """The optimiser's state with copied moments and integer steps."""
    content = optimizer.state_dict()
    shapes = [p.shape for group in optimizer.param_groups for p in group["params"]]
    moments = {"step", "exp_avg", "exp_inf"}
    if (len(content["param_groups"]) != 1 or shapes != [p.shape for p in model.parameters()]
            or any(s.keys() - {"ema"} != moments for s in content["state"].values())):  # fmt: skip
        raise InputError(
            f"the optimizer ({type(optimizer).__name__}) is not an Adamax with one group of this model's parameters in their "
            "order: use nvae_fast.optim.make_optimizer(model)"
        )
    for i, s in content["state"].items():
        content["state"][i] = {k: int(s[k]) if k == "step" else _copy(s[k]) for k in s if k in moments}
    return content


def cosine_state(training: TrainConfig, rate: float, epoch: int) -> dict[str, Any]:
    """The state of torch's CosineAnnealingLR after the epochs that the public code steps it in."""
    steps = max(epoch - 1 - training.warmup_epochs, 0)
    return {"T_max": float(training.epochs - training.warmup_epochs - 1), "eta_min": training.learning_rate_min,
            "base_lrs": [training.learning_rate], "last_epoch": steps, "_step_count": steps + 1, "_is_initial": False,
            "_get_lr_called_within_step": False, "_last_lr": [rate]}  # fmt: skip


def nvlabs_arch(name: str) -> dict[str, list[str]]:
    """The table of ops by cell type, as official files carry it."""
    places = ARCHITECTURES[name]
    kinds = {"enc": "down", "dec": "up", "pre": "down", "post": "up"}
    return {"ar_nn": [""]} | {f"{k}_{p}": list(ops) for p, ops in places.items() for k in ("normal", kinds[p])}


def to_nvlabs_args(config: NVAEConfig) -> dict[str, Any]:
    """The public code's flags for `config`, with its defaults for what we do not use."""
    own = {"name", "image_size", "channels", "padding", "likelihood", "compat", "training",
           "kl_balance", "adamax_eps", "data", "dataset", "binarize", "flip",
           "accumulate", "max_grad_norm", "ema_decay"}  # fmt: skip
    fields = {f.name: _KINDS.get(str(f.type), str)(getattr(part, f.name))
              for part in (config, config.training) for f in dataclasses.fields(part) if f.name not in own}  # fmt: skip
    if config.output_likelihood == "normal":
        fields["num_mixture_dec"] = 1  # how the public code asks for it
    paths = {"root": "/tmp/nasvae/expr", "save": "/tmp/nasvae/expr/eval-exp", "data": str(config.training.data)}
    processes = {"num_proc_node": 1, "node_rank": 0, "num_process_per_node": 1, "local_rank": 0, "global_rank": 0,
                 "master_address": "127.0.0.1", "distributed": False}  # fmt: skip
    # The public multi-tensor Adamax fails on a parameter without gradient, which `prior_ftr0` is in the vanilla case.
    return {**paths, "dataset": nearest_dataset(config), **fields, "fast_adamax": not config.vanilla, "cont_training": False,
            "num_total_iter": 0, **processes}  # fmt: skip


def nearest_dataset(config: NVAEConfig) -> str:
    """The public `--dataset` whose network has the shape of `config`, its own first; InputError if there is none."""
    for name in (config.training.dataset, *NVLABS_DATASETS):
        if name not in NVLABS_DATASETS or name == "stacked_mnist":  # which the public code names but cannot build
            continue
        data = DATASETS[name]
        same = (data.side, data.side) == config.image_size and data.padding == config.padding
        if same and NVLABS_DATASETS[name] == config.channels and data.binarize == (config.output_likelihood == "bernoulli"):
            return name
    raise InputError(
        f"the public code has no data set of {config.channels}-channel images of {config.image_size} with padding "
        f"{config.padding} and a {config.output_likelihood} likelihood: this model can be saved in the own format only"
    )


def _check_flags(config: NVAEConfig, flags: Mapping[str, Any]) -> TrainConfig:
    """The training configuration in `flags`; InputError unless they stand for the model of `config`."""
    if config.arch_instance == "res_mbconv9":
        raise InputError("the public code cannot build res_mbconv9: this model can be saved in the own format only")
    theirs = NVAEConfig.from_nvlabs_args(flags)
    skip = {"name", "likelihood", "compat", "training"} | ({"num_mixture_dec"} if config.output_likelihood != "dmol" else set())
    for name in ("output_likelihood", *(f.name for f in dataclasses.fields(config) if f.name not in skip)):
        flag, own = getattr(theirs, name), getattr(config, name)
        if flag != own:
            raise InputError(
                f"the flags stand for {name}={flag} in the public code, the model has {own}: leave it out of args, or save "
                "in the own format"
            )
    return theirs.training
