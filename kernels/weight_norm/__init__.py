"""Weight normalisation of many convolutions at once."""

from nvae_fast.kernels.weight_norm.api import weight_norm

__all__ = ["weight_norm"]
