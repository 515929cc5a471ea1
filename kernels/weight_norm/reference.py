"""weight_norm in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def weight_norm(
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor],
    masks: Sequence[Tensor | None] | None = None,
    *,
    eps: float = 1e-5,
) -> list[Tensor]:
    """w_eff[o] = exp(l[o]) * (w * mask)[o] / (||(w * mask)[o]|| + eps) of each weight; see `api.weight_norm`."""
    if masks is None:
        masks = [None] * len(weights)
    return [_weight_norm(*item, eps) for item in zip(weights, log_norms, masks, strict=True)]


def _weight_norm(weight: Tensor, log_norm: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    work = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(device_type=weight.device.type, enabled=False):
        w = weight.to(work)
        if mask is not None:
            w = w * mask.to(work)
        squares = w.square().sum(dim=tuple(range(1, w.dim())), keepdim=True)
        # The square root has an infinite slope at 0: take it of 1 there, so that the unselected branch stays finite.
        some = squares != 0  # NaN among them
        norm = torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0)
        return (torch.exp(log_norm.to(work)) * w / (norm + eps)).to(weight.dtype)
