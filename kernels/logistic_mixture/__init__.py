"""Discretised mixture of logistics over the levels of an image."""

from nvae_fast.kernels.logistic_mixture.api import (
    logistic_mixture_channels,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    logistic_mixture_sample,
)

__all__ = [
    "logistic_mixture_channels",
    "logistic_mixture_log_prob",
    "logistic_mixture_mean",
    "logistic_mixture_sample",
]
