"""One step of Adamax as torch itself does it, by its public functional form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamax import adamax


def adamax_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[Tensor],
    **options: Any,
) -> None:
    """`options` are torch's: lr, beta1, beta2, eps, weight_decay, maximize, foreach, capturable, differentiable."""
    if any(g.is_sparse for g in grads):  # which torch refuses in Adamax.step
        raise RuntimeError("Adamax does not support sparse gradients")
    lists = (list(tensors) for tensors in (params, grads, exp_avgs, exp_infs, steps))
    adamax(*lists, has_complex=any(map(torch.is_complex, params)), **options)
