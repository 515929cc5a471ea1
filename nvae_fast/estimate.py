"""How much memory a training run needs, found by tracing one step on tensors that have shapes and no values."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from nvae_fast.config import NVAEConfig
from nvae_fast.kernels._impl import load_native, use_impl
from nvae_fast.memory import PeakMemory
from nvae_fast.model import NVAE
from nvae_fast.regularization import SpectralState

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 2  # images of the second trace, from which the share of an image follows


class Footprint(NamedTuple):
    """Bytes that a training step holds at once, for one memory mode. Allocators and libraries take theirs on top."""

    weights: int  # parameters and buffers
    gradients: int
    optimizer: int  # two moments, and the moving average of the weights if there is one
    kept: int  # activations kept for backward, of the whole batch
    peak: int  # all of the above that live together, and what else does at the worst moment
    per_image: float  # by how much the peak grows with an image
    batch: int

    def at(self, batch: int) -> int:
        """The peak with that many images."""
        return round(self.peak + (batch - self.batch) * self.per_image)

    def largest_batch(self, budget: float) -> int:
        """The most images that fit into `budget` bytes, 0 if none does."""
        fixed = self.peak - self.batch * self.per_image
        if self.per_image <= 0:  # the worst moment has nothing to do with images: that of the weights' own arithmetic
            return self.batch if self.peak <= budget else 0
        return max(int((budget - fixed) / self.per_image), 0)


class Tracer:
    """`footprint(memory, batch)` of a configuration. A trace takes as long as calling the ops of the model: seconds, for the
    largest configurations half a minute; its memory is that of their bookkeeping.

    precision: "fp32", "bf16" or "fp16" (autocast); ema: whether a moving average of the weights is kept. The native
    implementations are traced where they are installed: those of a GPU keep the same tensors, or in "fast" fewer (`ActConv`).
    rival: a function of the model that returns another one with its parameters, to be traced on torch's own operations;
    layout: of images and weights.
    """

    def __init__(self, config: NVAEConfig, *, precision: str = "fp32", ema: bool = False,
                 rival: Callable[[nn.Module], nn.Module] | None = None,
                 layout: torch.memory_format = torch.channels_last) -> None:  # fmt: skip
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.config, self.precision, self.ema, self.layout = config, precision, ema, layout
        self._impl = "cpu" if rival is None and load_native()[0] is not None else "reference"
        self._fake = FakeTensorMode()
        self._kept_and_peak: dict[tuple[str, int], tuple[int, int]] = {}
        with self._fake:
            model = NVAE(config) if rival is None else rival(NVAE(config))
            self.model = (channels_last(model) if layout == torch.channels_last else model).train()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def footprint(self, memory: str, batch: int) -> Footprint:
        """Of a step on `batch` images in the memory mode "fast", "balanced" or "low"."""
        weights = sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers()))
        gradients = sum(p.nbytes for p in self.model.parameters())
        state = weights + gradients * (1 + 2 + self.ema)
        kept, peak = self._trace(memory, batch)
        other = SMALL if batch != SMALL else 2 * SMALL
        per_image = (peak - self._trace(memory, other)[1]) / (batch - other)
        if per_image <= 0:  # with so few images the worst moment is that of the gradients of all weights
            per_image = (self._trace(memory, 8 * batch)[1] - self._trace(memory, 4 * batch)[1]) / (4 * batch)
        return Footprint(weights, gradients, gradients * (2 + self.ema), kept, state + peak, per_image, batch)

    def _trace(self, memory: str, batch: int) -> tuple[int, int]:
        """(bytes kept between forward and backward, most bytes at once), beside weights, gradients and optimiser."""
        key = memory, batch
        if key not in self._kept_and_peak:
            c = self.config
            self.model.set_memory(memory)
            with self._fake, use_impl(self._impl):
                x = torch.empty(batch, c.channels, *c.image_size).contiguous(memory_format=self.layout)
                for p in self.model.parameters():
                    p.grad = torch.empty_like(p)
                spectral = SpectralState()
                with PeakMemory() as m:
                    dtype = AUTOCAST.get(self.precision)
                    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                        total = self.model.loss(x, kl_coeff=0.5, spectral_coeff=1e-2, spectral=spectral)["total"]
                    kept = m.live_bytes
                    total.backward()
            self._kept_and_peak[key] = kept, m.peak_bytes
        return self._kept_and_peak[key]


def available_memory(device: torch.device) -> int:
    """Bytes that a run may use: free memory of a GPU, else what the machine (or this process's cgroup) has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            return min(total, int(file.read()))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def channels_last(model: NVAE) -> NVAE:
    """As model.to(memory_format=torch.channels_last), which tensors without values refuse."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.dim() == 4:
                setattr(module, name, nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last)))
        for name, b in module.named_buffers(recurse=False):
            if b.dim() == 4:
                setattr(module, name, b.contiguous(memory_format=torch.channels_last))
    return model
