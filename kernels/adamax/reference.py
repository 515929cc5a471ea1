"""One step of Adamax on an arena in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

ROW = 16
"""Elements: every parameter of an arena begins at a multiple, which is a cache line."""


def flat_squares(grad: Tensor) -> Tensor:
    """The sum of the squares of grad [N], float64: finite just where all of grad is."""
    return grad.double().square().sum()


def flat_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_inf: Tensor,
    ema: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    active: Tensor,
    lr: Tensor,
    factor: Tensor | None,
    take: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    ema_decay: float,
) -> None:
    """The formula of `api.Arena` for flat param, grad, exp_avg, exp_inf, ema [N], in place.

    steps [P] and active [P] (bool: has a gradient) count parameters, rows [N / 16] names the one that 16 elements belong to.
    Scalars: lr (float64), factor, take (bool).
    """
    moving = active if take is None else active & take
    steps += moving
    sizes = (-(lr / (1 - torch.pow(beta1, steps.double())))).float()
    size, move = (t.index_select(0, rows).repeat_interleave(ROW) for t in (sizes, moving))
    g = grad if factor is None else grad * factor
    g = -g if maximize else g
    if weight_decay:
        g = g + weight_decay * param
    m = exp_avg.lerp(g, 1 - beta1)
    u = torch.maximum(beta2 * exp_inf, g.abs() + eps)
    y = param + size * m / u
    pairs = [(exp_avg, m), (exp_inf, u), (param, y)]
    if ema is not None:
        pairs.append((ema, ema.lerp(y, 1 - ema_decay)))
    for old, new in pairs:
        old.copy_(torch.where(move, new, old))
