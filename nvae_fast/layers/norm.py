"""Batch normalisation with its activation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nvae_fast import functional as F


class BatchNormAct2d(nn.BatchNorm2d):
    """nn.BatchNorm2d followed by an activation: y = act(gamma * (x - mean) / sqrt(var + eps) + beta).

    `act` is "swish" (u * sigmoid(u)), "elu" or "identity". Parameters, buffers and numbers are those of nn.BatchNorm2d, whose
    arguments it takes. In training, statistics are those of the batch, and the running ones move by `momentum`.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device=None, dtype=None, *, act: str = "swish") -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        tracked = self.track_running_stats and self.running_mean is not None
        return F.bn_act(
            x, self.weight, self.bias, self.running_mean, self.running_var,
            self.num_batches_tracked if self.training and tracked else None,
            training=self.training or not tracked, momentum=self.momentum, eps=self.eps, act=self.act,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}"


def bn_regularizer(bns: list[nn.BatchNorm2d]) -> Tensor:
    """Sum over BN layers of max_c |gamma_c|; 0 without layers."""
    if not bns:
        return torch.zeros(())
    return torch.stack([bn.weight.abs().max() for bn in bns]).sum()
