"""Squeeze-excitation, scaling and residual sum."""

from nvae_fast.kernels.se_residual.api import se_residual

__all__ = ["se_residual"]
