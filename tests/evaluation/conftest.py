"""Small models that were never trained, with BN statistics of their own, and the command line in this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nvae_fast import NVAE, NVAEConfig, TrainConfig

CONFIG = NVAEConfig(
    name="tiny", image_size=(16, 16), padding=2, num_latent_scales=2, num_groups_per_scale=2, ada_groups=True,
    num_latent_per_group=3, num_channels_enc=4, num_channels_dec=4, num_preprocess_blocks=1, num_postprocess_blocks=1,
    num_preprocess_cells=1, num_postprocess_cells=1, use_se=True, res_dist=True, compat="fixed",
    training=TrainConfig(binarize=True, dataset="npy", batch_size=8),
)  # fmt: skip
"""Three groups (4x4, 8x8, 8x8 after the padding of 2), Bernoulli."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(seed: int = 0, **changes) -> NVAE:
    """The model of CONFIG with these changes, in eval mode, with BN statistics and gains that are not the initial ones."""
    torch.manual_seed(seed)
    model = NVAE(dataclasses.replace(CONFIG, **changes))
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, model.config.channels, *model.config.image_size))
        for sampler in (*model.enc_sampler, *model.dec_sampler):
            for p in sampler.parameters():
                p += 0.2 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="session")
def make() -> Callable[..., NVAE]:
    """make(seed=0, **changes): a small model."""
    return build


@pytest.fixture(scope="session")
def waves() -> np.ndarray:
    """uint8 [60, 12, 12]: smooth grey images."""
    y, x = np.mgrid[:12, :12]
    a, b, c = np.random.default_rng(0).uniform(0.2, 1.0, (3, 60, 1, 1))
    return (127.5 + 127.4 * np.sin(a * y + b * x + 6 * c)).astype(np.uint8)


@pytest.fixture
def saved(tmp_path: Path, waves: np.ndarray) -> Path:
    """A folder with a small model, which names a file of 54 + 6 images as its data."""
    np.save(tmp_path / "waves.npy", waves)
    training = dataclasses.replace(CONFIG.training, data=str(tmp_path / "waves.npy"))
    build(training=training).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="session")
def reference_model(fixtures: Path) -> Callable[[str], tuple[NVAE, dict[str, torch.Tensor]]]:
    """reference_model("mnist_small"): the model of a fixture file, in eval mode, and the file's tensors."""

    def load(name: str) -> tuple[NVAE, dict[str, torch.Tensor]]:
        tensors = load_file(fixtures / f"{name}.safetensors")
        args = json.loads((fixtures / f"{name}.json").read_text())["args"]
        model = NVAE(NVAEConfig.from_nvlabs_args(args))
        model.load_nvlabs_state_dict({k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")})
        return model.eval(), tensors

    return load
