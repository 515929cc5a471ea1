"""Tensors of fixed numbers that stay on their device: copied there in every call they would make it wait, and a CUDA graph
cannot record the copy."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_kept: dict[Hashable, Tensor] = {}


def constant(key: Hashable, like: Tensor, build: Callable[[], Tensor]) -> Tensor:
    """What `build()` returned on the first call with this key, on the device of `like`; not to be written to."""
    if torch.compiler.is_compiling() or type(like) is not Tensor:  # a fake tensor, say: its constants are of no use elsewhere
        return built(build, like.device)
    place = (key, like.device)
    if place not in _kept:
        with torch.inference_mode(False):
            _kept[place] = built(build, like.device)
    return _kept[place]


def built(build: Callable[[], Tensor], device: torch.device) -> Tensor:
    return build().to(device)
