"""The table of everything that `nvae-fast bench` measures. A new case is a row here; a new op also a recipe in `ops.py`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from nvae_fast.benchmarks.cells import CELLS
from nvae_fast.benchmarks.ops import OPS, Inputs, Recipe
from nvae_fast.benchmarks.weights import WEIGHTS
from nvae_fast.errors import InputError, unknown

RECIPES: dict[str, Recipe] = OPS | WEIGHTS | CELLS
SUITES = ("ops", "cell", "step", "sampling", "memory", "optimizer", "check")
"""Those after cell have no rows here: presets, one optimiser, and what verify.py lists."""


@dataclass(frozen=True)
class Case:
    """One op on tensors of one shape. `shape` is that of its images, or how many weights there are."""

    suite: str
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_last"  # of our inputs: also "contiguous"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def name(self) -> str:
        return f"{self.op}/{'x'.join(map(str, self.shape))}/{self.dtype_name}"

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.op]

    def inputs(self, seed: int = 0) -> Inputs:
        """The same values for the same seed, on the CPU, in the layout of torch.randn."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(self.name.encode()))
        return self.recipe.make(self.shape, self.dtype, generator)


CASES = [
    Case("ops", "bn_act", (16, 384, 16, 16)),
    Case("ops", "bn_act", (32, 48, 32, 32)),
    Case("ops", "depthwise_conv", (32, 48, 32, 32)),
    Case("ops", "depthwise_conv", (32, 384, 8, 8)),
    Case("ops", "depthwise_conv", (32, 192, 8, 8)),
    Case("ops", "depthwise_conv", (32, 768, 4, 4)),
    Case("ops", "depthwise_conv", (16, 384, 16, 16)),
    Case("ops", "depthwise_conv", (16, 384, 16, 16), torch.bfloat16),
    Case("ops", "bn_swish_depthwise", (16, 384, 16, 16)),
    Case("ops", "bn_swish_depthwise", (16, 384, 16, 16), torch.bfloat16),
    Case("ops", "pointwise_conv", (16, 32, 32, 32)),
    Case("ops", "pointwise_conv", (8, 128, 16, 16)),
    Case("ops", "residual_normal", (16, 20, 16, 16)),
    Case("ops", "logistic_mixture_log_prob", (16, 100, 32, 32)),
    Case("ops", "power_iteration", (100,)),
    Case("ops", "weight_norm", (53,)),
    Case("ops", "flow_cell", (16, 20, 16, 16)),
    Case("ops", "se_residual", (16, 64, 16, 16)),
    Case("cell", "inverted_residual", (16, 32, 32, 32)),
    Case("cell", "inverted_residual", (8, 128, 16, 16)),
    Case("cell", "preact_branch", (16, 32, 32, 32)),
    Case("cell", "cell", (32, 32, 8, 8)),
    Case("cell", "cell", (32, 64, 16, 16)),
]


CIFAR10, FFHQ256 = (32, 256, 16, 16), (4, 60, 128, 128)
"""Images of a decoder cell at the largest latents of two published configurations, at their batches."""


def _expanded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], 6 * shape[1], *shape[2:]


GPU_CASES = [
    *(Case("ops", op, _expanded(shape), torch.bfloat16) for op in ("bn_act", "depthwise_conv", "bn_swish_depthwise")
      for shape in (CIFAR10, FFHQ256)),
    Case("ops", "bn_swish_depthwise", _expanded(CIFAR10)),
    *(Case("ops", op, shape, torch.bfloat16) for op in ("pointwise_conv", "se_residual") for shape in (CIFAR10, FFHQ256)),
    *(Case("ops", op, shape) for op in ("residual_normal", "flow_cell") for shape in ((32, 20, 16, 16), (4, 20, 128, 128))),
    Case("ops", "logistic_mixture_log_prob", (32, 100, 32, 32)),
    Case("ops", "logistic_mixture_log_prob", (4, 100, 256, 256)),
    Case("ops", "power_iteration", (100,)),
    Case("ops", "weight_norm", (53,)),
    *(Case("cell", op, shape, torch.bfloat16) for op in ("inverted_residual", "preact_branch", "cell")
      for shape in (CIFAR10, FFHQ256)),
]  # fmt: skip
"""What a GPU is measured on: the shapes above would not fill it."""


def select(suite: str, substring: str | None = None, *, gpu: bool = False) -> list[Case]:
    """The cases of a suite, for a CPU or a GPU, whose names contain `substring`. Raises InputError for an unknown suite, or
    when none is left."""
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    cases = [case for case in (GPU_CASES if gpu else CASES) if case.suite == suite]
    chosen = [case for case in cases if (substring or "") in case.name]
    if not chosen:
        raise InputError(f"no case of suite '{suite}' has '{substring}' in its name: {', '.join(c.name for c in cases)}")
    return chosen
