"""se_residual in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def se_residual(
    skip: Tensor,
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *,
    residual_scale: float = 0.1,
    bias: Tensor | None = None,
) -> Tensor:
    """skip + residual_scale * v * gate(mean over space of v), v = x + bias; see `api.se_residual`."""
    out_dtype = torch.promote_types(skip.dtype, x.dtype)
    work = torch.promote_types(out_dtype, torch.float32)
    with torch.autocast(device_type=x.device.type, enabled=False):
        wide = x.to(work)
        if bias is not None:
            wide = wide + bias.to(work)[:, None, None]
        branch = wide
        if w1 is not None:
            w1, b1, w2, b2 = (t.to(work) for t in (w1, b1, w2, b2))
            hidden = torch.relu(wide.mean(dim=(2, 3)) @ w1.t() + b1)
            gate = torch.sigmoid(hidden @ w2.t() + b2)
            branch = wide * gate[:, :, None, None]
        return (skip.to(work) + residual_scale * branch).to(out_dtype)
