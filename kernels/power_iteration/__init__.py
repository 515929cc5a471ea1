"""Largest singular value of many matrices by power iteration."""

from nvae_fast.kernels.power_iteration.api import power_iteration

__all__ = ["power_iteration"]
