"""The parity fixtures: numbers obtained from the public reference (tests/data/nvae_reference/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvae_fast import NVAE, NVAEConfig

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"
MODELS = ("cifar10_small", "mnist_small", "flow_small", "vanilla_small")


class Reference:
    """One fixture file: tensors by name, metadata, and our model with its state."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors = load_file(FIXTURES / f"{name}.safetensors")
        self.meta = json.loads((FIXTURES / f"{name}.json").read_text())

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def noise(self, prefix: str) -> list[torch.Tensor]:
        return [v for _, v in sorted(self.under(prefix).items())]

    def model(self, dtype: torch.dtype = torch.float32) -> NVAE:
        model = NVAE(NVAEConfig.from_nvlabs_args(self.meta["args"]))
        model.load_nvlabs_state_dict(self.under("state/"))
        return model.to(dtype)

    @property
    def x(self) -> torch.Tensor:
        return self["input/x_raw"]


_cache: dict[str, Reference] = {}


def load_reference(name: str) -> Reference:
    if name not in _cache:
        _cache[name] = Reference(name)
    return _cache[name]


@pytest.fixture(params=MODELS)
def ref(request: pytest.FixtureRequest) -> Reference:
    return load_reference(request.param)


@pytest.fixture
def blocks() -> Reference:
    return load_reference("blocks")


@pytest.fixture
def schedules() -> Reference:
    return load_reference("dists_and_schedules")
