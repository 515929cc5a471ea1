"""The branches and the residual cell of NVAE against what says the same in torch's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as tf
from torch import Generator, Tensor, nn
from torch.func import functional_call

from nvae_fast import functional as F
from nvae_fast.benchmarks.ops import Inputs, Recipe, Tensors, filters, normal
from nvae_fast.cells import Cell
from nvae_fast.kernels import _auto
from nvae_fast.kernels._impl import use_impl
from nvae_fast.layers import InvertedResidual

EXPANSION = 6
BN = {"eps": 1e-5, "momentum": 0.05}


class PlainBranch(nn.Sequential):
    """`layers.InvertedResidual` in torch's modules; parameters and buffers come in the same order."""

    def __init__(self, channels: int) -> None:
        hidden = EXPANSION * channels
        super().__init__(
            nn.BatchNorm2d(channels, **BN),
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden, **BN),
            nn.SiLU(),
            nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden, **BN),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels, **BN),
        )


class PlainCell(nn.Module):
    """`cells.Cell` of one such branch with squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.branch = PlainBranch(channels)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return x + 0.1 * (y * self.se(y.mean((2, 3)))[:, :, None, None])


class ModuleRecipe(Recipe):
    """A module of ours and its plain twin, both called on the leaves [x, *parameters] and the buffers in data; in a low
    precision x is stored in it, parameters are float32, and autocast does the rest.

    `functional_call` puts them in, which costs both sides the same (about 0.1 ms).
    """

    parts = ("inverted_residual", "se_residual")

    def __init__(self, ours: Callable[[int], nn.Module], plain: Callable[[int], nn.Module]) -> None:
        self._build = {"ours": ours, "plain": plain}
        self._modules: dict[tuple[str, int], tuple[nn.Module, list[str]]] = {}  # by side and channels; without values

    def _module(self, side: str, channels: int) -> tuple[nn.Module, list[str]]:
        if (side, channels) not in self._modules:
            with torch.device("meta"):
                module = self._build[side](channels)
            names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
            self._modules[side, channels] = module, names
        return self._modules[side, channels]

    def _call(self, side: str, inputs: Inputs) -> Tensors:
        x, *parameters = inputs.leaves
        module, names = self._module(side, x.shape[1])
        low = x.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(x.device.type, x.dtype if low else torch.bfloat16, enabled=low):
            return [functional_call(module, dict(zip(names, (*parameters, *inputs.data), strict=True)), (x,))]

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        module, _ = self._module("plain", shape[1])
        leaves = [normal(g, *shape)]
        for name, p in module.named_parameters():
            if p.dim() == 4:
                leaves.append(filters(g, *p.shape))
            elif p.dim() == 2:
                leaves.append(normal(g, *p.shape, scale=p.shape[1] ** -0.5))
            else:
                leaves.append((1.0 if name.endswith("weight") else 0.0) + normal(g, *p.shape, scale=0.1))
        buffers = [torch.ones(b.shape, dtype=b.dtype) for b in module.buffers()]
        return Inputs([leaves[0].to(dtype), *leaves[1:]], buffers)

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        with use_impl(impl):
            return self._call("ours", inputs)

    def plain(self, inputs: Inputs) -> Tensors:
        return self._call("plain", inputs)

    def traffic(self, inputs: Inputs, outputs: Tensors) -> None:
        """No number: it depends on what is fused with what."""


class PreactBranch(Recipe):
    """The branch of an encoder cell: BN, Swish and a 3 x 3 convolution, twice."""

    parts = ("conv2d",)

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        c = shape[1]
        weights = [filters(g, c, c, 3, 3).to(dtype) for _ in range(2)]
        affine = [shift + normal(g, c, scale=0.1) for _ in range(2) for shift in (1, 0)]
        return Inputs(
            [normal(g, *shape).to(dtype), *weights, *affine], [f(c) for _ in range(2) for f in (torch.zeros, torch.ones)]
        )

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        x, *weights = inputs.leaves[:3]
        affine, running = (zip(t[::2], t[1::2], strict=True) for t in (inputs.leaves[3:], inputs.data))
        norms = [F.Norm(*a, *r) for a, r in zip(affine, running, strict=True)]
        return [F.preact_branch(x, weights, norms, act="swish", impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        y, *weights = inputs.leaves[:3]
        for i, weight in enumerate(weights):
            affine, running = inputs.leaves[3 + 2 * i : 5 + 2 * i], inputs.data[2 * i : 2 * i + 2]
            u = tf.batch_norm(y, *running, *affine, True, 0.05, 1e-5)
            y = tf.conv2d(tf.silu(u), weight, padding=1)
        return [y]

    def around_cudnn(self, inputs: Inputs) -> Tensors:
        """Ours, without convolutions of our own."""
        with patch.object(_auto, "TRITON", {}):
            return self.ours("auto", inputs)

    def rivals(self, device: torch.device) -> dict[str, Callable[[Inputs], Tensors]]:
        return {"around_cudnn": self.around_cudnn} if device.type == "cuda" else {}

    def traffic(self, inputs: Inputs, outputs: Tensors) -> None:
        """No number, as above."""


CELLS: dict[str, Recipe] = {
    "preact_branch": PreactBranch(),
    "inverted_residual": ModuleRecipe(lambda c: InvertedResidual(c, c, expansion=EXPANSION, **BN), PlainBranch),
    "cell": ModuleRecipe(lambda c: Cell(c, c, [f"mconv_e{EXPANSION}k5g0"], stride=1, use_se=True), PlainCell),
}
