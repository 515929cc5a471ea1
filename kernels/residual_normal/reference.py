"""The latent distribution of NVAE in plain PyTorch. Runs on any device, in float64 too, and differentiates twice.

Elementwise functions first (fixtures and flows use them one by one), then the three public ones. All of them compute in
float32 at least, whatever autocast says; sums over space stay in that precision.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

CLAMP = 5.0
SIGMA_FLOOR = 0.01
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class ResidualNormalOutput(NamedTuple):
    z: Tensor
    kl: Tensor
    log_q: Tensor
    log_p: Tensor


def soft_clamp(x: Tensor) -> Tensor:
    return CLAMP * torch.tanh(x / CLAMP)


def normal_params(mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    sigma = torch.exp(soft_clamp(log_sigma)) + SIGMA_FLOOR
    if temperature != 1.0:
        sigma = temperature * sigma
    return soft_clamp(mu), sigma


def log_density(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    return -0.5 * ((z - mu) / sigma).square() - HALF_LOG_2PI - sigma.log()


def kl_divergence(mu_q: Tensor, sigma_q: Tensor, mu_p: Tensor, sigma_p: Tensor) -> Tensor:
    ratio = sigma_q / sigma_p
    return 0.5 * ((mu_q - mu_p) / sigma_p).square() + 0.5 * ratio.square() - 0.5 - ratio.log()


def residual_normal(
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None,
    log_sigma_p: Tensor | None,
    noise: Tensor,
    residual: bool,
    bias: Tensor | None = None,
) -> ResidualNormalOutput:
    dtype = mu_q.dtype
    with torch.autocast(mu_q.device.type, enabled=False):
        mu_q, log_sigma_q, noise = wide(mu_q), wide(log_sigma_q), wide(noise)
        if bias is not None:
            mu_q, log_sigma_q = (t + b for t, b in zip((mu_q, log_sigma_q), bias.view(2, -1, 1, 1), strict=True))
        if mu_p is None or log_sigma_p is None:
            prior = normal_params(torch.zeros_like(mu_q), torch.zeros_like(mu_q))
        else:
            mu_p, log_sigma_p = wide(mu_p), wide(log_sigma_p)
            prior = normal_params(mu_p, log_sigma_p)
            if residual:
                mu_q, log_sigma_q = mu_p + mu_q, log_sigma_p + log_sigma_q
        mu, sigma = normal_params(mu_q, log_sigma_q)
        z = mu + sigma * noise
        kl = kl_divergence(mu, sigma, *prior)
        log_q = log_density(z, mu, sigma)
        log_p = log_density(z, *prior)
        return ResidualNormalOutput(z.to(dtype), *(t.sum((2, 3)) for t in (kl, log_q, log_p)))


def normal_sample(mu: Tensor, log_sigma: Tensor, noise: Tensor, temperature: float) -> Tensor:
    with torch.autocast(mu.device.type, enabled=False):
        mean, sigma = normal_params(wide(mu), wide(log_sigma), temperature)
        return (mean + sigma * wide(noise)).to(mu.dtype)


def normal_log_prob(z: Tensor, mu: Tensor | None, log_sigma: Tensor | None) -> Tensor:
    with torch.autocast(z.device.type, enabled=False):
        z = wide(z)
        mu, log_sigma = (torch.zeros_like(z) if t is None else wide(t) for t in (mu, log_sigma))
        return log_density(z, *normal_params(mu, log_sigma)).sum((2, 3))


def wide(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()
