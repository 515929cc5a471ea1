"""The data of a run, and the configuration fitted to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch

from nvae_fast.config import NVAEConfig
from nvae_fast.data import ImageSource, Loader, make_loader, open_images
from nvae_fast.errors import InputError


def open_split(config: NVAEConfig, split: str, **options: Any) -> ImageSource:
    """The training or validation images that the configuration names; split by its seed where the data have no split.

    `options` are further arguments of `open_images`: image_size, max_corrupt, images_per_epoch, window.
    """
    t = config.training
    return open_images(t.data, split=split, dataset=t.dataset, seed=t.seed, **options)


def fit_to_data(config: NVAEConfig, source: ImageSource, fixed: Collection[str] = ()) -> NVAEConfig:
    """The configuration with the size and the channels of the data; fields named in `fixed` stay as they are.

    Padding is kept only if the padded size suits the model's strides. Data in colour are not binarised unless asked for.
    """
    training = config.training
    if source.channels != 1 and "binarize" not in fixed and config.likelihood == "auto":
        training = dataclasses.replace(training, binarize=False)
    fitted = fit_to_size(config, (source.height, source.width), fixed)
    return dataclasses.replace(fitted, channels=source.channels, training=training)


def fit_to_size(config: NVAEConfig, size: tuple[int, int], fixed: Collection[str] = ()) -> NVAEConfig:
    """The configuration for images of that (H, W); as in `fit_to_data`."""
    padding = config.padding
    padded = all((side + 2 * padding) % config.total_stride == 0 for side in size)
    if not padded and "padding" not in fixed:
        padding = 0
    return dataclasses.replace(config, image_size=(size[0] + 2 * padding, size[1] + 2 * padding), padding=padding)


def check_data(config: NVAEConfig, source: ImageSource) -> None:
    """InputError unless the images are what the model takes."""
    if source.channels != config.channels:
        raise InputError(
            f"'{source.name}' has images of {source.channels} channel(s), the model takes {config.channels}: "
            "use the data, or the configuration, that it was trained with"
        )
    if (source.height, source.width) != config.data_size:
        height, width = config.data_size
        raise InputError(
            f"'{source.name}' has images of {source.height}x{source.width}, the model takes {height}x{width}: "
            f"use --image-size {height}{'' if height == width else f'x{width}'}"
        )


def loader(config: NVAEConfig, source: ImageSource, *, train: bool, batch_size: int | None = None, workers: int = 0,
           limit: int | None = None, rank: int = 0, world: int = 1, device: torch.device | None = None) -> Loader:  # fmt: skip
    """Batches [B, C, H, W] in [0, 1] of a source, padded, binarised and flipped as the configuration says.

    `batch_size` is that of each process; `rank`, `world` and `device` as in `make_loader`.
    """
    check_data(config, source)
    t = config.training
    return make_loader(source, batch_size or t.batch_size, train=train, seed=t.seed, padding=config.padding, flip=t.flip,
                       binarize=t.binarize, workers=workers, limit=limit, rank=rank, world=world,
                       device=device)  # fmt: skip
