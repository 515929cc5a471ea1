"""What a model is (`NVAEConfig`) and how it is trained (`TrainConfig`).

Field names are those of the public NVAE command line (`--num_channels_enc 128` is `num_channels_enc=128`), so one vocabulary
serves configurations, flags and imported checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nvae_fast.cells import ARCHITECTURES
from nvae_fast.data import DATASETS, MAX_SIDE, check_size
from nvae_fast.errors import InputError, unknown

LIKELIHOODS = ("auto", "bernoulli", "normal", "dmol")
KL_BALANCES = ("equal", "linear", "sqrt", "square")
COMPATS = ("nvlabs", "fixed")


KINDS = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "a word"),
    "str | None": ((str, type(None)), "a word or nothing"),
}
MANY, DEEP, WIDE = 10**9, 1000, 2**16  # more is a slip of the finger
HALVINGS = MAX_SIDE.bit_length() - 1  # of the largest image, down to one pixel
LIMITS = {  # of TrainConfig and NVAEConfig: least, most
    **dict.fromkeys(("batch_size", "accumulate"), (1, MANY)), "epochs": (1, MANY), "warmup_epochs": (0, MANY),
    **dict.fromkeys(("kl_anneal_portion", "kl_const_portion", "kl_const_coeff"), (0, 1)),
    **dict.fromkeys(("max_grad_norm", "learning_rate_min", "weight_decay", "weight_decay_norm"), (0, math.inf)),
    "num_x_bits": (1, 8), "channels": (1, DEEP), "padding": (0, MAX_SIDE // 2),
    **dict.fromkeys(("num_groups_per_scale", "min_groups_per_scale", "num_mixture_dec"), (1, DEEP)),
    **dict.fromkeys(("num_preprocess_cells", "num_postprocess_cells"), (1, DEEP)),
    **dict.fromkeys(("num_cell_per_cond_enc", "num_cell_per_cond_dec", "num_nf"), (0, DEEP)),
    **dict.fromkeys(("num_latent_per_group", "num_channels_enc", "num_channels_dec"), (1, WIDE)),
    "num_latent_scales": (1, 1 + HALVINGS), "num_preprocess_blocks": (0, HALVINGS), "num_postprocess_blocks": (0, HALVINGS),
}  # fmt: skip

NVLABS_DATASETS = {
    name: 1 if name in ("mnist", "omniglot") else 3
    for name in ("mnist", "omniglot", "stacked_mnist", "cifar10", "celeba_64", "celeba_256", "imagenet_32", "ffhq",
                 "lsun_bedroom_128", "lsun_church_128", "lsun_church_64")
}  # fmt: skip
"""Channels by the public code's `--dataset` name; size, padding and treatment are those of `nvae_fast.data.DATASETS`."""


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation and data settings; defaults are the public code's.

    Rates are per step, `weight_decay` is L2 on every parameter, `weight_decay_norm` (lambda) weighs the spectral and the BN
    regulariser, `kl_*_portion` are shares of all training steps. `data` names what to read (`--data`), `dataset` how to read it
    (None: guess). `binarize` draws binary pixels afresh at every access, `flip` mirrors horizontally with probability 1/2. A
    batch goes through the model in `accumulate` parts; gradients are scaled down to the norm `max_grad_norm` (0: left
    alone). With an `ema_decay` above 0 the weights are averaged, ema <- d ema + (1 - d) weight at every step, too.
    """

    epochs: int = 200
    warmup_epochs: int = 5
    batch_size: int = 200
    learning_rate: float = 1e-2
    learning_rate_min: float = 1e-4
    weight_decay: float = 3e-4
    weight_decay_norm: float = 0.0
    weight_decay_norm_init: float = 10.0
    weight_decay_norm_anneal: bool = False
    kl_anneal_portion: float = 0.3
    kl_const_portion: float = 1e-4
    kl_const_coeff: float = 1e-4
    kl_balance: str = "square"
    adamax_eps: float = 1e-3
    seed: int = 1
    data: str = "demo"
    dataset: str | None = None
    binarize: bool = False
    flip: bool = False
    accumulate: int = 1
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.epochs <= self.warmup_epochs + 1:
            raise InputError(
                f"epochs={self.epochs} leaves no cosine decay after warmup_epochs={self.warmup_epochs}: "
                f"use --epochs {self.warmup_epochs + 2} or more, or a shorter --warmup_epochs"
            )
        for name in ("learning_rate", "adamax_eps"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        if self.weight_decay_norm_anneal:
            for name in ("weight_decay_norm", "weight_decay_norm_init"):
                _require(getattr(self, name) > 0, name, getattr(self, name), "above 0 when annealed")
        if self.batch_size % self.accumulate:
            raise InputError(f"accumulate={self.accumulate} must divide batch_size={self.batch_size} into equal parts")
        _require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (no average) or above, and below 1")
        if self.kl_balance not in KL_BALANCES:
            raise unknown("KL balance", self.kl_balance, KL_BALANCES)


@dataclass(frozen=True)
class NVAEConfig:
    """Structure and likelihood of an NVAE; defaults are the public code's.

    `image_size` (H, W) is what the network sees, i.e. the data plus `padding` zero pixels on every side; the likelihood leaves
    the padding out. `likelihood="auto"` is Bernoulli for binarised data, else a Normal for one mixture component and a
    discretised mixture of logistics (`dmol`) for more. `compat="nvlabs"` reproduces the public code's likelihood and sampling
    quirks (DMOL threshold 0.99, temperature dividing the pixel scale), "fixed" the corrected forms.
    """

    name: str = "custom"
    image_size: tuple[int, int] = (32, 32)
    channels: int = 1
    padding: int = 0
    likelihood: str = "auto"
    num_x_bits: int = 8
    num_mixture_dec: int = 10
    arch_instance: str = "res_mbconv"
    num_latent_scales: int = 1
    num_groups_per_scale: int = 10
    num_latent_per_group: int = 20
    ada_groups: bool = False
    min_groups_per_scale: int = 1
    num_channels_enc: int = 32
    num_channels_dec: int = 32
    num_preprocess_blocks: int = 2
    num_postprocess_blocks: int = 2
    num_preprocess_cells: int = 3
    num_postprocess_cells: int = 3
    num_cell_per_cond_enc: int = 1
    num_cell_per_cond_dec: int = 1
    num_nf: int = 0
    use_se: bool = False
    res_dist: bool = False
    compat: str = "nvlabs"
    training: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        size = self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        _require(len(size) == 2 and all(type(n) is int for n in size), "image_size", size, "height and width in pixels")
        object.__setattr__(self, "image_size", size)
        _check_fields(self)
        if self.arch_instance not in ARCHITECTURES:
            raise unknown("architecture", self.arch_instance, ARCHITECTURES)
        if self.likelihood not in LIKELIHOODS:
            raise unknown("likelihood", self.likelihood, LIKELIHOODS)
        if self.compat not in COMPATS:
            raise unknown("compat", self.compat, COMPATS)
        if self.num_preprocess_blocks != self.num_postprocess_blocks:
            raise InputError(
                f"num_preprocess_blocks={self.num_preprocess_blocks} and num_postprocess_blocks="
                f"{self.num_postprocess_blocks} must be equal: the output would not have the size of the input"
            )
        if self.vanilla and self.num_channels_enc != self.num_channels_dec:
            raise InputError(
                f"num_channels_enc={self.num_channels_enc} and num_channels_dec={self.num_channels_dec} must be equal "
                "with one scale of one group (the latent decoder has the encoder's width)"
            )
        check_size(*self.image_size, self.total_stride, padding=self.padding)

    @property
    def vanilla(self) -> bool:
        """One scale of one group: an ordinary VAE, without towers."""
        return self.num_latent_scales == 1 and self.num_groups_per_scale == 1

    @property
    def total_stride(self) -> int:
        """How often the smallest latent map fits along an image side: 2^(P + S - 1)."""
        return 2 ** (self.num_preprocess_blocks + self.num_latent_scales - 1)

    @property
    def groups_per_scale(self) -> list[int]:
        """Latent groups by scale, the LARGEST scale first; halved from scale to scale with `ada_groups`."""
        groups, n = [], self.num_groups_per_scale
        for _ in range(self.num_latent_scales):
            groups.append(n)
            if self.ada_groups:
                n = max(self.min_groups_per_scale, n // 2)
        return groups

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(Z, h, w) of every group in the order in which they are drawn: top-down, smallest scale first."""
        shapes = []
        for s in reversed(range(self.num_latent_scales)):
            stride = 2 ** (self.num_preprocess_blocks + s)
            h, w = (side // stride for side in self.image_size)
            shapes += [(self.num_latent_per_group, h, w)] * self.groups_per_scale[s]
        return shapes

    @property
    def output_likelihood(self) -> str:
        """`likelihood` with "auto" resolved."""
        if self.likelihood != "auto":
            return self.likelihood
        return "bernoulli" if self.training.binarize else "normal" if self.num_mixture_dec == 1 else "dmol"

    @property
    def data_size(self) -> tuple[int, int]:
        """(H, W) of the data themselves, without the padding."""
        height, width = (side - 2 * self.padding for side in self.image_size)
        return height, width

    @property
    def data_dims(self) -> int:
        """C * H * W of the pixels that the likelihood covers: the divisor of bits/dim (784 for MNIST)."""
        return self.channels * math.prod(self.data_size)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; `from_dict` reads it back."""
        return dataclasses.asdict(self) | {"image_size": list(self.image_size)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NVAEConfig:
        """The configuration written by `to_dict`; InputError for fields it does not know."""
        values = dict(values)
        training = _fields(TrainConfig, values.pop("training", {}), "training configuration")
        return cls(**_fields(cls, values, "configuration"), training=TrainConfig(**training))

    @classmethod
    def from_nvlabs_args(cls, args: Mapping[str, Any] | Namespace) -> NVAEConfig:
        """The configuration that a public NVAE command line (flags by name, as a dict or Namespace) stands for.

        Missing flags take the public defaults; flags without a meaning for model and training (paths, ranks) are ignored.
        """
        args = dict(vars(args)) if isinstance(args, Namespace) else dict(args)
        dataset = args.get("dataset", "mnist")
        if dataset not in NVLABS_DATASETS:
            raise unknown("dataset", dataset, NVLABS_DATASETS)
        entry = DATASETS[dataset]
        training = TrainConfig(
            **_known(TrainConfig, args) | {"dataset": dataset, "binarize": entry.binarize, "flip": entry.flip}
        )
        model = _known(cls, args) | {
            "name": dataset, "image_size": (entry.side, entry.side), "channels": NVLABS_DATASETS[dataset],
            "padding": entry.padding, "likelihood": "auto", "training": training,
        }  # fmt: skip
        return cls(**model)


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{name}={value} must be {expected}")


def _check_fields(config: TrainConfig | NVAEConfig) -> None:
    """InputError for a field of another type than it should have, one that is not finite or not within LIMITS."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type in KINDS:
            kind, words = KINDS[f.type]
            _require(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)), f.name, repr(value), words)
        if isinstance(value, float):
            _require(math.isfinite(value), f.name, value, "a finite number")
        if f.name in LIMITS:
            least, most = LIMITS[f.name]
            _require(least <= value <= most, f.name, value, f"at least {least}" if value < least else f"at most {most}")


def _names(cls: type) -> set[str]:
    return {f.name for f in dataclasses.fields(cls)}


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    skip = {"name", "data", "training"}
    return {k: v for k, v in values.items() if k in _names(cls) - skip and v is not None}


def _fields(cls: type, values: Mapping[str, Any], what: str) -> dict[str, Any]:
    for name in values:
        if name not in _names(cls):
            raise unknown(f"field of the {what}", name, _names(cls))
    return dict(values)
