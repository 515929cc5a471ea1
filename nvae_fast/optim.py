"""The optimiser of NVAE."""

from __future__ import annotations

import torch

from nvae_fast.model import NVAE


def make_optimizer(model: NVAE) -> torch.optim.Adamax:
    """Adamax over all parameters, as the configuration says (multi-tensor)."""
    c = model.config.training
    return torch.optim.Adamax(model.parameters(), lr=c.learning_rate, betas=(0.9, 0.999), eps=c.adamax_eps,
                              weight_decay=c.weight_decay, foreach=True)  # fmt: skip
