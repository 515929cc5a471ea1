"""The whole training step as one CUDA graph. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nvae_fast.graph import CallGraph, Found


def graph_obstacle(device: torch.device) -> str | None:
    """Why a step on this device cannot be a graph, in a few words; None if it can."""
    if device.type != "cuda":
        return f"the model is on the {device.type}, expected cuda"
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return f"there are {dist.get_world_size()} processes, expected one"
    return None


class StepGraph(CallGraph):
    """`graph(x, rate, kl_coeff, norm_coeff)`: a CallGraph whose x and numbers lie in memory of the graph. Batches of another
    shape, and calls where the regularisers are switched on or off, run as they are."""

    def __init__(self, run: Callable[..., Found], device: torch.device, valid: Callable[[], bool]) -> None:
        super().__init__("the step", run, device, valid=valid)
        self._numbers = torch.zeros(3, dtype=torch.float64, device=device)

    def kind(self, x: Tensor, rate: float, kl_coeff: float, norm_coeff: float) -> Hashable:
        return x.shape, x.stride(), x.dtype, bool(norm_coeff)

    def places(self, x: Tensor, rate: float, kl_coeff: float, norm_coeff: float) -> tuple[Any, ...]:
        self._x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.device)
        return self._x, *self._numbers.unbind()[:2], self._numbers[2] if norm_coeff else None

    def recorded(self, x: Tensor, rate: Tensor, kl_coeff: Tensor, norm_coeff: Tensor | None) -> Found:
        # as Python's floats enter float32 tensors
        return self.run(x, rate, kl_coeff.float(), 0.0 if norm_coeff is None else norm_coeff.float())

    def fill(self, x: Tensor, rate: float, kl_coeff: float, norm_coeff: float) -> None:
        self._x.copy_(x, non_blocking=True)
        for place, number in zip(self._numbers.unbind(), (rate, kl_coeff, norm_coeff), strict=True):
            place.fill_(number)
