"""The table of everything that `nvae-fast bench` measures. A new case is a row here; a new op also a recipe in `ops.py`."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from nvae_fast.benchmarks.cells import CELLS
from nvae_fast.benchmarks.ops import OPS, Inputs, Recipe
from nvae_fast.errors import InputError, unknown

RECIPES: dict[str, Recipe] = OPS | CELLS
SUITES = ("ops", "cell", "step")  # the cases of step are presets: steps.py


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
    Case("cell", "cell", (32, 32, 8, 8)),
    Case("cell", "cell", (32, 64, 16, 16)),
]


def select(suite: str, substring: str | None = None) -> list[Case]:
    """The cases of a suite whose names contain `substring`. Raises InputError for an unknown suite, or when none is left."""
    if suite not in SUITES:
        raise unknown("suite", suite, SUITES)
    cases = [case for case in CASES if case.suite == suite]
    chosen = [case for case in cases if (substring or "") in case.name]
    if not chosen:
        raise InputError(f"no case of suite '{suite}' has '{substring}' in its name: {', '.join(c.name for c in cases)}")
    return chosen
