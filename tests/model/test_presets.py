"""The published configurations against tables typed here: settings, sizes of the networks, latent shapes."""

from __future__ import annotations

import pytest
import torch

from nvae_fast import NVAE, PRESETS, InputError, to_nvlabs_state_dict
from nvae_fast.objective import kl_alpha
from nvae_fast.presets import PUBLISHED

NAMES = ("mnist", "cifar10", "celeba64", "imagenet32", "celebahq256", "ffhq256")
SETTINGS = {  # field: value by preset in the order of NAMES
    "epochs": (400, 400, 90, 45, 300, 200),
    "batch_size": (200, 32, 16, 24, 4, 4),
    "warmup_epochs": (5, 5, 5, 1, 5, 5),
    "learning_rate": (1e-2, 1e-2, 1e-2, 1e-2, 1e-2, 8e-3),
    "learning_rate_min": (1e-4,) * 6,
    "weight_decay": (3e-4,) * 6,
    "weight_decay_norm": (1e-2, 1e-2, 1e-1, 1e-2, 1e-2, 1e-1),
    "weight_decay_norm_anneal": (False, False, False, True, True, True),
    "weight_decay_norm_init": (None, None, None, 1.0, 1.0, 1.0),
    "kl_anneal_portion": (0.3,) * 6,
    "kl_const_portion": (1e-4,) * 6,
    "kl_const_coeff": (1e-4,) * 6,
    "kl_balance": ("square",) * 6,
    "adamax_eps": (1e-3,) * 6,
    "dataset": ("mnist", "cifar10", "celeba_64", "imagenet_32", "celeba_256", "ffhq"),
    "binarize": (True, False, False, False, False, False),
    "flip": (False, True, True, True, True, True),
    "seed": (1,) * 6,
    "accumulate": (1,) * 6,
    "max_grad_norm": (0.0,) * 6,
    "ema_decay": (0.0,) * 6,
    "arch_instance": ("res_mbconv",) * 6,
    "use_se": (True,) * 6,
    "res_dist": (True,) * 6,
    "num_latent_per_group": (20,) * 6,
    "num_cell_per_cond_enc": (2,) * 6,
    "num_cell_per_cond_dec": (2,) * 6,
    "num_channels_enc": (32, 128, 64, 192, 30, 30),
    "num_channels_dec": (32, 128, 64, 192, 30, 30),
    "num_latent_scales": (2, 1, 3, 1, 5, 5),
    "num_groups_per_scale": (10, 30, 20, 28, 16, 16),
    "ada_groups": (True, False, True, False, True, True),
    "min_groups_per_scale": (1, 1, 1, 1, 4, 4),
    "num_preprocess_blocks": (2, 1, 1, 1, 1, 1),
    "num_postprocess_blocks": (2, 1, 1, 1, 1, 1),
    "num_preprocess_cells": (3, 2, 2, 2, 2, 2),
    "num_postprocess_cells": (3, 2, 2, 2, 2, 2),
    "num_nf": (0, 1, 1, 1, 2, 2),
    "num_x_bits": (8, 8, 8, 8, 5, 5),
    "num_mixture_dec": (None, 10, 10, 10, 10, 10),
    "output_likelihood": ("bernoulli", "dmol", "dmol", "dmol", "dmol", "dmol"),
    "channels": (1, 3, 3, 3, 3, 3),
    "padding": (2, 0, 0, 0, 0, 0),
    "image_size": ((32, 32), (32, 32), (64, 64), (32, 32), (256, 256), (256, 256)),
    "data_dims": (784, 3072, 12288, 3072, 196608, 196608),
    "compat": ("nvlabs",) * 6,
    "groups_per_scale": ([10, 5], [30], [20, 10, 5], [28], [16, 8, 4, 4, 4], [16, 8, 4, 4, 4]),
    "total_stride": (8, 2, 8, 2, 32, 32),
}
SIDES = ([8, 4], [16], [32, 16, 8], [16], [128, 64, 32, 16, 8], [128, 64, 32, 16, 8])  # the largest scale first
ALPHA = {"celeba64": [1.0] * 5 + [2.0] * 10 + [4.0] * 20, "cifar10": [1.0] * 30,
         "ffhq256": [1.0] * 4 + [4.0] * 4 + [16.0] * 4 + [32.0] * 8 + [64.0] * 16}  # fmt: skip
SIZES = {  # parameters (M), their tensors, state keys, convolutions, distinct matrix shapes, BN layers, top latent, prior_ftr0
    "mnist": (33.36, 1269, 2016, 255, 38, 214, (20, 4, 4), (256, 4, 4)),
    "cifar10": (130.85, 2566, 3838, 610, 23, 364, (20, 16, 16), (256, 16, 16)),
    "celeba64": (153.28, 3072, 4596, 730, 45, 436, (20, 8, 8), (512, 8, 8)),
    "imagenet32": (268.51, 2398, 3586, 570, 23, 340, (20, 16, 16), (384, 16, 16)),
    "ffhq256": (330.80, 3746, 5354, 986, 67, 460, (20, 8, 8), (960, 8, 8)),
}


def bare(name: str) -> NVAE:
    """The network of a preset without its memory."""
    with torch.device("meta"):
        return NVAE(PRESETS[name])


def test_the_published_presets_are_these():
    assert PUBLISHED == NAMES and set(NAMES) < set(PRESETS)


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_published_settings(index):
    config = PRESETS[NAMES[index]]
    for field, values in SETTINGS.items():
        part = config if hasattr(config, field) else config.training
        if values[index] is not None:
            assert getattr(part, field) == values[index], field
    # every field of both parts stands in the table, but for those that say nothing about a published run
    covered = set(SETTINGS) | {"name", "likelihood", "training", "data"}
    assert set(config.__dataclass_fields__) | set(config.training.__dataclass_fields__) <= covered


@pytest.mark.parametrize("index", range(6), ids=NAMES)
def test_latent_shapes(index):
    config = PRESETS[NAMES[index]]
    sides = [h for h, groups in zip(SIDES[index], config.groups_per_scale, strict=True) for _ in range(groups)]
    assert config.latent_shapes == [(20, h, h) for h in reversed(sides)]


def test_kl_balance():
    for name, alpha in ALPHA.items():
        assert kl_alpha(PRESETS[name].groups_per_scale) == alpha


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    model = bare(name)
    params = list(model.parameters())
    shapes = {(w.shape[0], w[0].numel()) for w in (conv.weight for conv in model.convolutions())}
    found = (
        round(sum(p.numel() for p in params) / 1e6, 2), len(params), len(to_nvlabs_state_dict(model)),
        len(model.convolutions()), len(shapes), len(model.batch_norms()), model.config.latent_shapes[0],
        tuple(model.prior_ftr0.shape),
    )  # fmt: skip
    assert found == SIZES[name]


@pytest.mark.parametrize(
    ("name", "twin"), [("celebahq256", "ffhq256"), ("lsun_church64", "celeba64"), ("lsun_bedroom128", "lsun_church128")]
)
def test_networks_that_are_the_same(name, twin):
    one, two = (
        {k: v for k, v in PRESETS[n].to_dict().items() if k not in ("name", "training", "compat")} for n in (name, twin)
    )
    assert one == two


@pytest.mark.parametrize("name", sorted(set(PRESETS) - set(NAMES) - {"lsun_church64", "lsun_bedroom128"}))
def test_presets_of_ours_build(name):
    config = bare(name).config
    assert config == PRESETS[name] and all(side % config.total_stride == 0 for side in config.image_size)


def test_names_resemble_their_presets():
    assert all(config.name == name for name, config in PRESETS.items())
    with pytest.raises(InputError, match="unknown preset 'cifar': did you mean cifar10") as error:
        PRESETS["cifar"]
    assert "\n" not in str(error.value)
    assert "cifar" not in PRESETS
