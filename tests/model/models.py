"""Small models and their inputs, which tests of this folder share."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nvae_fast import NVAE, NVAEConfig

CONFIG = NVAEConfig(
    image_size=(16, 24), channels=3, num_mixture_dec=2, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3,
    num_channels_enc=4, num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, use_se=True, res_dist=True,
)  # fmt: skip  # fmt: skip
VANILLA = NVAEConfig(image_size=8, num_latent_scales=1, num_groups_per_scale=1, num_channels_enc=4, num_channels_dec=4,
                     num_latent_per_group=2, num_preprocess_cells=1, num_postprocess_cells=1, likelihood="bernoulli",
                     num_preprocess_blocks=1, num_postprocess_blocks=1)  # fmt: skip  # fmt: skip
TERMS = {"total", "recon", "kl", "balanced_kl", "kl_all", "kl_coeffs", "spectral", "bn"}


def build(config: NVAEConfig = CONFIG, seed: int = 0, **changes) -> NVAE:
    torch.manual_seed(seed)
    return NVAE(dataclasses.replace(config, **changes))


def images(config: NVAEConfig = CONFIG, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.channels, *config.image_size)
    return torch.randint(0, 256, shape, generator=generator) / 255


def noise(config: NVAEConfig = CONFIG, batch: int = 2, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for shape in config.latent_shapes]
