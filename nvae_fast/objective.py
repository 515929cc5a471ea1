"""The training objective: reconstruction, KL warm-up and balancing, and every schedule as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvae_fast.config import TrainConfig
from nvae_fast.kernels._constant import constant


def reconstruction_loss(dist, x: Tensor, padding: int = 0) -> Tensor:
    """-log p(x|z) per image [B] in nats, leaving out `padding` pixels on every side of the log-probability map."""
    log_prob = dist.log_prob(x)
    if padding:
        log_prob = log_prob[..., padding:-padding, padding:-padding]
    return -log_prob.flatten(1).sum(1)


def kl_alpha(groups_per_scale: Sequence[int], schedule: str = "square") -> list[float]:
    """Relative KL weight of every group, top-down, the smallest value 1.

    `groups_per_scale` has the largest scale first. At the t-th scale from the top, holding G groups: "equal" 1, "linear" 2^t,
    "sqrt" sqrt(2^t), "square" 4^t / G.
    """
    value = {
        "equal": lambda t, g: 1.0,
        "linear": lambda t, g: 2.0**t,
        "sqrt": lambda t, g: math.sqrt(2.0**t),
        "square": lambda t, g: 4.0**t / g,
    }[schedule]
    alpha = [value(t, groups) for t, groups in enumerate(reversed(groups_per_scale)) for _ in range(groups)]
    return [a / min(alpha) for a in alpha]


def balance_kl(
    kl_all: Tensor, kl_coeff: float | Tensor, alpha: Sequence[float], *, balance: bool = True,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(kl_coeff * sum_i gamma_i kl_i per image [B], gamma [N]) for kl_all [N, B].

    gamma_i is (mean_batch |kl_i| + 0.01) / alpha_i over its mean, without gradient: groups far from their share are pushed
    less. All ones once kl_coeff reaches 1, or without `balance`. A kl_coeff that is a tensor (a float32 scalar) gives the bits
    that its number gives. `reduce` turns this process's means [N] into those of the joined batch of several (None: they are
    those of the batch).
    """
    gamma = torch.ones_like(kl_all[:, 0])
    scheduled = isinstance(kl_coeff, Tensor)
    if balance and (scheduled or kl_coeff < 1):
        key = (tuple(alpha), kl_all.dtype)
        shares = constant(key, kl_all, lambda: torch.tensor(alpha, dtype=kl_all.dtype))
        mean = kl_all.detach().abs().mean(1)
        balanced = ((mean if reduce is None else reduce(mean)) + 0.01) / shares
        balanced = balanced / balanced.mean()
        gamma = torch.where(kl_coeff < 1, balanced, gamma) if scheduled else balanced
    return kl_coeff * (gamma[:, None] * kl_all).sum(0), gamma


def kl_coefficient(step: int, total_steps: int, c: TrainConfig) -> float:
    """beta = max(min((step - const) / ramp, 1), floor), const and ramp being shares of `total_steps`; step counts from 0."""
    const, ramp = c.kl_const_portion * total_steps, c.kl_anneal_portion * total_steps
    if ramp == 0:
        return 1.0 if step >= const else c.kl_const_coeff
    return max(min((step - const) / ramp, 1.0), c.kl_const_coeff)


def norm_coefficient(kl_coeff: float, c: TrainConfig) -> float:
    """lambda, the weight of the spectral and BN regularisers; geometric from its initial value as beta goes to 1."""
    if not c.weight_decay_norm_anneal:
        return c.weight_decay_norm
    return math.exp((1 - kl_coeff) * math.log(c.weight_decay_norm_init) + kl_coeff * math.log(c.weight_decay_norm))


def learning_rate(step: int, steps_per_epoch: int, c: TrainConfig) -> float:
    """Linear warm-up by step (the first step has rate 0), then a cosine by epoch down to `learning_rate_min`.

    The cosine starts from the last warm-up value, as PyTorch's recursive CosineAnnealingLR does, not from `learning_rate`.
    """
    warmup = c.warmup_epochs * steps_per_epoch
    if step < warmup:
        return c.learning_rate * step / warmup
    start = c.learning_rate * (warmup - 1) / warmup if warmup else c.learning_rate
    progress = (step // steps_per_epoch - c.warmup_epochs) / (c.epochs - c.warmup_epochs - 1)
    return c.learning_rate_min + (start - c.learning_rate_min) * (1 + math.cos(math.pi * progress)) / 2
