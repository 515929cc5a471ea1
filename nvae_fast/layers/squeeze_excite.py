"""Squeeze-and-excitation (Hu et al. 2018), alone or together with the residual sum."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nvae_fast import functional as F


class SqueezeExcite(nn.Module):
    """x * sigmoid(W2 relu(W1 mean_hw(x) + b1) + b2), with a hidden width of max(channels // 16, 4)."""

    def __init__(self, channels: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or max(channels // 16, 4)
        self.reduce = nn.Linear(channels, hidden)
        self.expand = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x.new_zeros(()).expand_as(x), x, scale=1.0)

    def residual(self, skip: Tensor, x: Tensor, *, scale: float = 0.1, **options: Any) -> Any:
        """skip + scale * SE(x), in one op; `options` are those of `functional.se_residual`."""
        gate = self.reduce.weight, self.reduce.bias, self.expand.weight, self.expand.bias
        return F.se_residual(skip, x, *gate, residual_scale=scale, **options)
