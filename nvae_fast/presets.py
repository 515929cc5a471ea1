"""Named configurations: the published ones (hyper-parameters of the NVAE paper's code) and our own, labelled so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvae_fast.config import NVLABS_DATASETS, NVAEConfig, TrainConfig
from nvae_fast.data import DATASETS
from nvae_fast.errors import unknown

PUBLISHED = ("mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256")
"""Presets with the published hyper-parameters; batch sizes are per GPU, of which 2, 8, 8, 24, 24 and 24 were used."""

_MODEL = dict(use_se=True, res_dist=True, num_latent_per_group=20, num_cell_per_cond_enc=2, num_cell_per_cond_dec=2)
_COLOUR = dict(num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=2, num_postprocess_cells=2)
_FACES = dict(_COLOUR, num_latent_scales=5, num_groups_per_scale=16, ada_groups=True, min_groups_per_scale=4, num_channels=30,
              num_nf=2, num_x_bits=5)  # fmt: skip

_TABLE: dict[str, dict[str, Any]] = {
    "mnist": dict(dataset="mnist", epochs=400, batch_size=200, num_channels=32, num_latent_scales=2, num_groups_per_scale=10,
                  ada_groups=True, weight_decay_norm=1e-2),
    "cifar10": dict(_COLOUR, dataset="cifar10", epochs=400, batch_size=32, num_channels=128, num_groups_per_scale=30,
                    num_nf=1, weight_decay_norm=1e-2),
    "celeba64": dict(_COLOUR, dataset="celeba_64", epochs=90, batch_size=16, num_channels=64, num_latent_scales=3,
                     num_groups_per_scale=20, ada_groups=True, num_nf=1, weight_decay_norm=1e-1),
    "imagenet32": dict(_COLOUR, dataset="imagenet_32", epochs=45, batch_size=24, num_channels=192, num_groups_per_scale=28,
                       num_nf=1, weight_decay_norm=1e-2, weight_decay_norm_init=1.0, weight_decay_norm_anneal=True,
                       warmup_epochs=1),
    "celebahq256": dict(_FACES, dataset="celeba_256", epochs=300, batch_size=4, weight_decay_norm=1e-2,
                        weight_decay_norm_init=1.0, weight_decay_norm_anneal=True),
    "ffhq256": dict(_FACES, dataset="ffhq", epochs=200, batch_size=4, learning_rate=8e-3, weight_decay_norm=1e-1,
                    weight_decay_norm_init=1.0, weight_decay_norm_anneal=True),
    # Ours from here on.
    # Latents 8x8 (two groups), 4x4 and 2x2: without the last, three epochs are too few for coherent samples.
    "demo": dict(dataset="mnist", data="demo", reader="demo", compat="fixed", epochs=3, warmup_epochs=0, batch_size=32,
                 learning_rate=7e-3, learning_rate_min=1e-3, weight_decay_norm=1e-3, num_channels=8, num_latent_scales=3,
                 num_groups_per_scale=2, ada_groups=True, num_latent_per_group=8, num_preprocess_cells=1,
                 num_postprocess_cells=1, num_cell_per_cond_enc=1, num_cell_per_cond_dec=1),
    "cifar10_multiscale": dict(_COLOUR, dataset="cifar10", compat="fixed", epochs=400, batch_size=32, num_channels=128,
                               num_latent_scales=2, num_groups_per_scale=20, ada_groups=True, num_nf=1,
                               weight_decay_norm=1e-2),
    "omniglot": dict(dataset="omniglot", compat="fixed", epochs=400, batch_size=200, num_channels=32, num_latent_scales=2,
                     num_groups_per_scale=10, ada_groups=True, weight_decay_norm=1e-2),
    "stacked_mnist": dict(dataset="stacked_mnist", compat="fixed", epochs=200, batch_size=200, num_channels=32,
                          num_latent_scales=2, num_groups_per_scale=10, ada_groups=True, weight_decay_norm=1e-2),
    "lsun_church64": dict(_COLOUR, dataset="lsun_church_64", compat="fixed", epochs=90, batch_size=16, num_channels=64,
                          num_latent_scales=3, num_groups_per_scale=20, ada_groups=True, num_nf=1, weight_decay_norm=1e-1),
    "lsun_church128": dict(_COLOUR, dataset="lsun_church_128", compat="fixed", epochs=90, batch_size=8, num_channels=48,
                           num_latent_scales=4, num_groups_per_scale=16, ada_groups=True, min_groups_per_scale=4, num_nf=1,
                           num_x_bits=5, weight_decay_norm=1e-1),
    "lsun_bedroom128": dict(_COLOUR, dataset="lsun_bedroom_128", compat="fixed", epochs=20, batch_size=8, num_channels=48,
                            num_latent_scales=4, num_groups_per_scale=16, ada_groups=True, min_groups_per_scale=4, num_nf=1,
                            num_x_bits=5, weight_decay_norm=1e-1, warmup_epochs=1),
    # A hierarchical VAE before NVAE: no BN, no depthwise cells, no SE, no residual Normals; autoregressive flows instead.
    "iaf_vae": dict(dataset="cifar10", compat="fixed", epochs=200, batch_size=32, num_channels=40, arch_instance="res_elu",
                    num_latent_scales=2, num_groups_per_scale=10, num_latent_per_group=32, num_preprocess_blocks=1,
                    num_postprocess_blocks=1, num_preprocess_cells=2, num_postprocess_cells=2, num_nf=1, use_se=False,
                    res_dist=False, learning_rate=2e-3, weight_decay=0.0),
}  # fmt: skip


def _build(name: str, row: Mapping[str, Any]) -> NVAEConfig:
    row = {**_MODEL, **row}
    data = DATASETS[row["dataset"]]
    width, channels = row.pop("num_channels"), NVLABS_DATASETS[row["dataset"]]
    row |= dict(num_channels_enc=width, num_channels_dec=width, flip=data.flip, binarize=data.binarize)
    row["dataset"] = row.pop("reader", row["dataset"])
    training = TrainConfig(**{k: row.pop(k) for k in list(row) if k in TrainConfig.__dataclass_fields__})
    return NVAEConfig(name=name, image_size=(data.side, data.side), channels=channels, padding=data.padding,
                      training=training, **row)  # fmt: skip


class _Presets(dict[str, NVAEConfig]):
    def __missing__(self, name: str) -> NVAEConfig:
        raise unknown("preset", name, self)


PRESETS: Mapping[str, NVAEConfig] = _Presets({name: _build(name, row) for name, row in _TABLE.items()})
"""Configurations by name: `PRESETS["cifar10"]`; an unknown name is an InputError that lists the nearest ones."""
