"""The discretised mixture of logistics in plain PyTorch: the definition that every other implementation is tested
against. Inside, means and scales are [B, C, M, H, W], images are in [-1, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_LOG_SCALE = -7.0


class Mixture(NamedTuple):
    logits: Tensor  # [B, M, H, W]
    means: Tensor  # [B, C, M, H, W]
    log_scales: Tensor  # [B, C, M, H, W], clamped below
    coefficients: Tensor  # [B, C(C-1)/2, M, H, W], in (-1, 1), order (1,0), (2,0), (2,1), (3,0) ...


def logistic_mixture_log_prob(
    x: Tensor, params: Tensor, *, num_mixtures: int, num_bits: int = 8, compat: str = "nvlabs"
) -> Tensor:
    """Log-probability of the pixels, summed over channels: [B, H, W]; see `api.logistic_mixture_log_prob`."""
    work = torch.promote_types(params.dtype, torch.float32)
    top_level = 2**num_bits - 1
    # With 8 bits the reference's 0.99 also catches level 254 (0.99216). 0.999 catches the top level alone for every
    # depth up to 8 bits, as -0.999 does the bottom one.
    top_threshold = 0.99 if compat == "nvlabs" else 0.999
    with torch.autocast(device_type=params.device.type, enabled=False):
        x = 2.0 * x.to(work) - 1.0
        mixture = _unpack(params.to(work), x.shape[1], num_mixtures)
        means = _shifted_means(mixture, x)
        x = x.unsqueeze(2)
        inv_scale = torch.exp(-mixture.log_scales)
        centred = x - means
        plus = inv_scale * (centred + 1.0 / top_level)
        minus = inv_scale * (centred - 1.0 / top_level)
        mid = inv_scale * centred
        delta = torch.sigmoid(plus) - torch.sigmoid(minus)

        # Every branch is evaluated, so each has to be finite, with a finite gradient, where it is not selected.
        log_cdf = plus - F.softplus(plus)
        log_survival = -F.softplus(minus)
        log_mass = torch.log(delta.clamp(min=1e-10))
        log_density = mid - mixture.log_scales - 2.0 * F.softplus(mid) - math.log(top_level / 2)
        inner = torch.where(delta > 1e-5, log_mass, log_density)
        log_prob = torch.where(x < -0.999, log_cdf, torch.where(x > top_threshold, log_survival, inner))
        return torch.logsumexp(log_prob.sum(dim=1) + F.log_softmax(mixture.logits, dim=1), dim=1)


def logistic_mixture_sample(
    params: Tensor,
    u_mixture: Tensor,
    u_logistic: Tensor,
    *,
    num_mixtures: int,
    temperature: float = 1.0,
    compat: str = "nvlabs",
) -> Tensor:
    """One draw [B, C, H, W] in [0, 1] from uniforms in (0, 1); see `api.logistic_mixture_sample`."""
    work = torch.promote_types(params.dtype, torch.float32)
    scale_factor = 1.0 / temperature if compat == "nvlabs" else temperature
    with torch.autocast(device_type=params.device.type, enabled=False):
        u_mixture, u_logistic = (u.to(work).clamp(1e-5, 1.0 - 1e-5) for u in (u_mixture, u_logistic))
        mixture = _unpack(params.to(work), u_logistic.shape[1], num_mixtures)
        gumbel = -torch.log(-torch.log(u_mixture))
        choice = (mixture.logits / temperature + gumbel).argmax(dim=1)[:, None, None]
        means, log_scales, coefficients = (
            torch.gather(t, 2, choice.expand(-1, t.shape[1], -1, -1, -1)).squeeze(2) for t in mixture[1:]
        )
        logistic = torch.log(u_logistic) - torch.log1p(-u_logistic)
        return _chain(means + scale_factor * torch.exp(log_scales) * logistic, coefficients)


def logistic_mixture_mean(params: Tensor, *, channels: int, num_mixtures: int) -> Tensor:
    """Image [B, C, H, W] in [0, 1] of averaged means and coefficients; see `api.logistic_mixture_mean`."""
    work = torch.promote_types(params.dtype, torch.float32)
    with torch.autocast(device_type=params.device.type, enabled=False):
        mixture = _unpack(params.to(work), channels, num_mixtures)
        weights = F.softmax(mixture.logits, dim=1).unsqueeze(1)
        return _chain((weights * mixture.means).sum(dim=2), (weights * mixture.coefficients).sum(dim=2))


def _unpack(params: Tensor, channels: int, m: int) -> Mixture:
    """Splits the head's output. Three channels keep NVAE's layout, in which every colour also holds M coefficients."""
    batch, _, height, width = params.shape
    logits, rest = params[:, :m], params[:, m:]
    if channels == 3:
        colours = rest.reshape(batch, 3, 3 * m, height, width)
        means, log_scales, raw = colours.split(m, dim=2)
    else:
        pairs = channels * (channels - 1) // 2
        colours, raw = rest.split([2 * m * channels, m * pairs], dim=1)
        means, log_scales = colours.reshape(batch, channels, 2 * m, height, width).split(m, dim=2)
        raw = raw.reshape(batch, pairs, m, height, width)
    # clamp(), with a gradient at equality, which torch's own has before 2.15 alone
    log_scales = torch.where(log_scales < MIN_LOG_SCALE, MIN_LOG_SCALE, log_scales)
    return Mixture(logits, means, log_scales, torch.tanh(raw))


def _shifted_means(mixture: Mixture, x: Tensor) -> Tensor:
    """mean_c + sum over earlier channels j of a_cj x_j, [B, C, M, H, W]."""
    shifted, pair = [], 0
    for c in range(x.shape[1]):
        mean = mixture.means[:, c]
        for j in range(c):
            mean = mean + mixture.coefficients[:, pair] * x[:, j : j + 1]
            pair += 1
        shifted.append(mean)
    return torch.stack(shifted, dim=1)


def _chain(values: Tensor, coefficients: Tensor) -> Tensor:
    """Adds the clamped earlier channels to each channel, clamps it to [-1, 1], and maps the image to [0, 1]."""
    image: list[Tensor] = []
    pair = 0
    for c in range(values.shape[1]):
        value = values[:, c]
        for j in range(c):
            value = value + coefficients[:, pair] * image[j]
            pair += 1
        image.append(value.clamp(-1.0, 1.0))
    return torch.stack(image, dim=1) / 2.0 + 0.5
