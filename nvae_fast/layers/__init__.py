"""Layers for any model: each subclasses the torch module it replaces and keeps its state_dict and its numbers."""

from nvae_fast.layers.conv import MaskedConv2d, WeightNormConv2d, shared_effective_weights
from nvae_fast.layers.inverted_residual import InvertedResidual
from nvae_fast.layers.norm import BatchNormAct2d
from nvae_fast.layers.squeeze_excite import SqueezeExcite

__all__ = [
    "BatchNormAct2d",
    "InvertedResidual",
    "MaskedConv2d",
    "SqueezeExcite",
    "WeightNormConv2d",
    "shared_effective_weights",
]
