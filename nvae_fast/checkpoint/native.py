"""The own checkpoint: a folder of config.json, model.safetensors and, in training, training.safetensors and training.json."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_folder, atomic_write, check_keys
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.model import NVAE

CONFIG, MODEL, TRAINING, META = "config.json", "model.safetensors", "training.safetensors", "training.json"
EMA = "optimizer/ema/"  # in front of the names of averaged weights in training.safetensors


def save_model(model: NVAE, directory: str | Path) -> None:
    """config.json and model.safetensors in `directory`, each replaced as a whole."""
    directory = Path(directory)
    atomic_write(directory / CONFIG, lambda file: file.write(json_bytes(model.config.to_dict())))
    atomic_write(directory / MODEL, lambda file: _save_tensors(model.state_dict(), file.name))


def load_model(directory: str | Path, *, averaged: bool = False) -> NVAE:
    """The model saved in `directory`, in eval mode; with `averaged` the weights' moving average where there is one."""
    directory = resolve_checkpoint(directory)
    model = NVAE(read_config(directory))
    load_weights(model, directory)
    if averaged:
        model.load_state_dict(averaged_weights(directory, model), strict=False)
    return model.eval()


def averaged_weights(directory: str | Path, model: NVAE) -> dict[str, Tensor]:
    """The exponential moving average of parameters in a checkpoint folder, by name: tensors `optimizer/ema/<name>` of
    training.safetensors. Empty without them; InputError when some do not fit the model."""
    path = Path(directory) / TRAINING
    if not path.is_file():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(EMA)]
            found = {name.removeprefix(EMA): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"'{path}' is damaged ({error}): use another checkpoint") from None
    check_keys({name: p for name, p in model.named_parameters() if name in found}, found)  # some may have had no gradient
    return found


def load_weights(model: NVAE, directory: str | Path) -> None:
    """Fill `model` from model.safetensors; InputError when it belongs to another configuration."""
    state = read_tensors(Path(directory) / MODEL)
    check_keys(model.state_dict(), state)
    model.load_state_dict(state)


def save_training(directory: str | Path, model: NVAE, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """A new checkpoint folder of weights and training state; it appears at once and whole."""
    with atomic_folder(directory) as folder:
        (folder / CONFIG).write_bytes(json_bytes(model.config.to_dict()))
        (folder / META).write_bytes(json_bytes(meta))
        _save_tensors(model.state_dict(), folder / MODEL)
        _save_tensors(tensors, folder / TRAINING)


def load_training(directory: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The training tensors and the training.json of a checkpoint folder."""
    return read_tensors(Path(directory) / TRAINING), read_json(Path(directory) / META)


def resolve_checkpoint(path: str | Path) -> Path:
    """The folder that holds the weights: `path` itself, or what a run folder's checkpoints/best (else latest) names."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no checkpoint at '{path}': give a run folder, a checkpoint folder or an official checkpoint.pt")
    for candidate in (path, named(path / "checkpoints", "best"), named(path / "checkpoints", "latest")):
        if candidate is not None and (candidate / MODEL).is_file():
            return candidate
    raise InputError(f"'{path}' holds no {MODEL}: give a run folder or a checkpoint folder")


def named(checkpoints: Path, label: str) -> Path | None:
    """The checkpoint folder that the text file `label` (latest, best) in `checkpoints` names; None without that file."""
    file = checkpoints / label
    try:
        name = file.read_text(errors="replace").strip()
    except OSError:
        return None
    folder = checkpoints / Path(name).name
    if not name or not (folder / MODEL).is_file():
        raise InputError(f"'{file}' names no checkpoint ('{name}'): write the name of one there, or remove '{checkpoints}'")
    return folder


def read_config(directory: str | Path) -> NVAEConfig:
    """The configuration in a checkpoint or run folder."""
    path = Path(directory) / CONFIG
    try:
        return NVAEConfig.from_dict(read_json(path))
    except (TypeError, ValueError, ArithmeticError) as error:  # InputErrors, too
        raise InputError(f"'{path}' is not a configuration of this version ({error}): use another checkpoint") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError naming the file if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}; is this a checkpoint folder?") from None
    except ValueError as error:
        raise InputError(f"'{path}' is not valid JSON ({error}): the checkpoint is damaged, use another one") from None
    if not isinstance(value, dict):
        raise InputError(f"'{path}' holds a {type(value).__name__}: expected an object; use another checkpoint")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError naming the file if it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"no '{path}': is this a checkpoint folder?") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"'{path}' is damaged ({error}): use another checkpoint") from None


def finite(value: Any) -> Any:
    """A JSON value with None, JSON's null, for every number in it that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """A JSON object as UTF-8, for a file."""
    return (json.dumps(value, indent=1) + "\n").encode()


def _save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    try:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error)) from None
