"""Official states of small models, and the files made of them."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvae_fast import NVAE, NVAEConfig

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"


class Official:
    """The state dict, the flags and the parameter order of a model of the public code."""

    def __init__(self, name: str) -> None:
        self.meta = json.loads((FIXTURES / f"{name}.json").read_text())
        tensors = load_file(FIXTURES / f"{name}.safetensors")
        self.state = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
        self.flags: dict[str, Any] = self.meta["args"]
        self.order: list[str] = self.meta["param_order"]

    @property
    def config(self) -> NVAEConfig:
        return NVAEConfig.from_nvlabs_args(self.flags)

    def model(self) -> NVAE:
        model = NVAE(self.config)
        model.load_nvlabs_state_dict(self.state)
        return model


_cache: dict[str, Official] = {}


def _official(name: str) -> Official:
    if name not in _cache:
        _cache[name] = Official(name)
    return _cache[name]


@pytest.fixture(params=("cifar10_small", "mnist_small", "flow_small", "vanilla_small"))
def official(request: pytest.FixtureRequest) -> Official:
    return _official(request.param)


@pytest.fixture
def tiny() -> Official:
    """The smallest of them."""
    return _official("vanilla_small")


@pytest.fixture
def read():
    """read(path): the content of a file as a user of PyTorch reads it, allowing argparse.Namespace alone."""

    def load(path: Path) -> dict[str, Any]:
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, weights_only=True)

    return load


@pytest.fixture
def write(tmp_path: Path):
    """write(state, args): a checkpoint.pt with what an importer needs; no `args` for None."""

    def save(state: dict[str, Tensor], args: object, *, zip_format: bool = True, **more: object) -> Path:
        path = tmp_path / "checkpoint.pt"
        content = {"state_dict": state, **({} if args is None else {"args": args}), **more}
        torch.save(content, path, _use_new_zipfile_serialization=zip_format)
        return path

    return save
