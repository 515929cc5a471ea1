"""Batch normalisation followed by an activation."""

from nvae_fast.kernels.bn_act.api import bn_act

__all__ = ["bn_act"]
