"""The branch and the residual cell of NVAE's decoder against the modules of torch.nn that say the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from nvae_fast.benchmarks.ops import Inputs, Recipe, Tensors, filters, normal
from nvae_fast.cells import Cell
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


CELLS: dict[str, Recipe] = {
    "inverted_residual": ModuleRecipe(lambda c: InvertedResidual(c, c, expansion=EXPANSION, **BN), PlainBranch),
    "cell": ModuleRecipe(lambda c: Cell(c, c, [f"mconv_e{EXPANSION}k5g0"], stride=1, use_se=True), PlainCell),
}
