"""Distributions of the image given the decoder's output.

Images are float tensors in [0, 1], [B, C, H, W]. The decoder's output is taken to float32 (float64 stays), and so
are all log-probabilities, draws and means. `decoder_distribution` picks the class by its name in the config.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.errors import InputError, unknown
from nvae_fast.kernels.logistic_mixture import (
    logistic_mixture_channels,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    logistic_mixture_sample,
)
from nvae_fast.kernels.residual_normal.reference import log_density, normal_params

LIKELIHOODS = ("bernoulli", "normal", "dmol")
COMPAT = ("nvlabs", "fixed")


class Bernoulli:
    """p(x = 1) = sigmoid(logits), pixel by pixel. logits: [B, C, H, W]."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = _at_least_float32(logits)

    def log_prob(self, x: Tensor) -> Tensor:
        """x logits - softplus(logits), [B, C, H, W]; x in [0, 1] need not be binary."""
        _check_like("image", x, self.logits)
        with _full_precision(self.logits):
            return -F.binary_cross_entropy_with_logits(self.logits, x.to(self.logits.dtype), reduction="none")

    def sample(self, temperature: float = 1.0, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """1 where noise < sigmoid(logits / temperature), else 0. noise: uniforms in [0, 1), [B, C, H, W]."""
        _check_temperature(temperature)
        if noise is None:
            noise = _draw(torch.rand, self.logits, generator)
        _check_like("noise", noise, self.logits)
        return (noise < torch.sigmoid(self.logits / temperature)).to(self.logits.dtype)

    @property
    def mean(self) -> Tensor:
        return torch.sigmoid(self.logits)


class NormalDecoder:
    """Normal(mu, sigma) over 2x - 1, with mu = 5 tanh(m / 5) and sigma = exp(5 tanh(s / 5)) + 0.01.

    params [B, 2C, H, W] hold the C channels of m, then those of s. The log-probability is a density per unit of the
    interval [-1, 1], so bits/dim of this likelihood do not compare with those of a discrete one.
    """

    def __init__(self, params: Tensor, channels: int, compat: str = "nvlabs") -> None:
        _check_channels(params, output_channels("normal", channels), f"the normal likelihood of {channels} channels")
        _check_compat(compat)
        self.compat = compat
        with _full_precision(params):
            self.mu, self.sigma = normal_params(*_at_least_float32(params).chunk(2, dim=1))

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of 2x - 1, [B, C, H, W]."""
        _check_like("image", x, self.mu)
        with _full_precision(self.mu):
            return log_density(2.0 * x.to(self.mu.dtype) - 1.0, self.mu, self.sigma)

    def sample(self, temperature: float = 1.0, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """clamp(mu + t sigma noise, -1, 1) mapped to [0, 1]; noise: standard normal, [B, C, H, W].

        t is the temperature under compat "fixed". NVlabs/NVAE ignores it: under "nvlabs" t = 1.
        """
        _check_temperature(temperature)
        if noise is None:
            noise = _draw(torch.randn, self.mu, generator)
        _check_like("noise", noise, self.mu)
        sigma = self.sigma if self.compat == "nvlabs" else temperature * self.sigma
        return (self.mu + sigma * noise).clamp(-1.0, 1.0) / 2.0 + 0.5

    @property
    def mean(self) -> Tensor:
        return self.mu.clamp(-1.0, 1.0) / 2.0 + 0.5


class LogisticMixture:
    """Discretised mixture of logistics over levels of `num_bits` bits; see `functional.logistic_mixture_log_prob`.

    params: [B, M (1 + 2C + C(C-1)/2), H, W]. compat "nvlabs" keeps the reference's upper threshold and divides the
    scale by the temperature when sampling; "fixed" sums to 1 and multiplies.
    """

    def __init__(self, params: Tensor, channels: int, num_mixtures: int, num_bits: int = 8, compat: str = "nvlabs") -> None:
        expected = output_channels("dmol", channels, num_mixtures)
        _check_channels(params, expected, f"{num_mixtures} mixtures of {channels} channels")
        _check_compat(compat)
        self.params = _at_least_float32(params)
        self.channels, self.num_mixtures, self.num_bits, self.compat = channels, num_mixtures, num_bits, compat

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-probability of the level of each pixel, summed over channels, [B, H, W]."""
        return logistic_mixture_log_prob(
            x, self.params, num_mixtures=self.num_mixtures, num_bits=self.num_bits, compat=self.compat
        )

    def sample(
        self,
        temperature: float = 1.0,
        noise: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """A draw that is not rounded to levels. noise: uniforms ([B, M, H, W], [B, C, H, W])."""
        _check_temperature(temperature)
        return logistic_mixture_sample(
            self.params,
            channels=self.channels,
            num_mixtures=self.num_mixtures,
            temperature=temperature,
            noise=noise,
            compat=self.compat,
            generator=generator,
        )

    @property
    def mean(self) -> Tensor:
        return logistic_mixture_mean(self.params, channels=self.channels, num_mixtures=self.num_mixtures)


def decoder_distribution(
    params: Tensor,
    *,
    likelihood: str,
    channels: int,
    num_mixtures: int = 10,
    num_bits: int = 8,
    compat: str = "nvlabs",
) -> Bernoulli | NormalDecoder | LogisticMixture:
    """The distribution of an image of `channels` channels given the decoder's output `params`."""
    _check_compat(compat)
    if likelihood == "bernoulli":
        _check_channels(params, channels, f"the Bernoulli likelihood of {channels} channels")
        return Bernoulli(params)
    if likelihood == "normal":
        return NormalDecoder(params, channels, compat)
    if likelihood == "dmol":
        return LogisticMixture(params, channels, num_mixtures, num_bits, compat)
    raise unknown("likelihood", likelihood, LIKELIHOODS)


def output_channels(likelihood: str, channels: int, num_mixtures: int = 10) -> int:
    """Channels that the decoder has to produce: C, 2C or M (1 + 2C + C(C-1)/2)."""
    if likelihood == "bernoulli":
        return channels
    if likelihood == "normal":
        return 2 * channels
    if likelihood == "dmol":
        return logistic_mixture_channels(channels, num_mixtures)
    raise unknown("likelihood", likelihood, LIKELIHOODS)


def reduce_bits(x: Tensor, num_bits: int) -> Tensor:
    """floor(255 x / 2^(8-b)) / (2^b - 1): an image of 8 bits to one of b bits, both in [0, 1]. 8 bits: x itself.

    A reduced image stays as it is: its level k is mapped to floor(k + r) with 0 <= r < 1, and r is above the
    rounding error of float32 for every k > 0.
    """
    if not 1 <= num_bits <= 8:
        raise InputError(f"num_bits {num_bits}: expected 1 to 8 bits per channel; 8 keeps the images as they are")
    if num_bits == 8:
        return x
    return torch.floor(255.0 * _at_least_float32(x) / 2 ** (8 - num_bits)) / (2**num_bits - 1)


def _at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _full_precision(t: Tensor) -> torch.autocast:
    return torch.autocast(device_type=t.device.type, enabled=False)


def _draw(kind, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return kind(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise InputError(f"temperature {temperature}: expected a positive number; `.mean` has no noise")


def _check_channels(params: Tensor, expected: int, what: str) -> None:
    if params.dim() != 4 or params.shape[1] != expected:
        raise InputError(
            f"decoder output of shape {tuple(params.shape)}: expected [B, {expected}, H, W] for {what}; "
            "`output_channels` gives the count"
        )


def _check_like(name: str, t: Tensor, like: Tensor) -> None:
    if t.shape != like.shape:
        raise InputError(f"{name} of shape {tuple(t.shape)}: expected that of the distribution, {tuple(like.shape)}")


def _check_compat(compat: str) -> None:
    if compat not in COMPAT:
        raise unknown("compat", compat, COMPAT)
