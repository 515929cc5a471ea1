"""Layers for any model: each replaces torch modules and keeps their state_dict and their numbers."""

from nvae_fast.layers.conv import MaskedConv2d, WeightNormConv2d
from nvae_fast.layers.conv_bn_act import DepthwiseConvBNAct, PointwiseConvBNAct
from nvae_fast.layers.inverted_residual import InvertedResidual
from nvae_fast.layers.norm import BatchNormAct2d, convert_sync_batch_norm
from nvae_fast.layers.residual_normal import ResidualNormal
from nvae_fast.layers.shared import effective, shared_effective_weights
from nvae_fast.layers.squeeze_excite import SqueezeExcite

__all__ = [
    "BatchNormAct2d",
    "DepthwiseConvBNAct",
    "InvertedResidual",
    "MaskedConv2d",
    "PointwiseConvBNAct",
    "ResidualNormal",
    "SqueezeExcite",
    "WeightNormConv2d",
    "convert_sync_batch_norm",
    "effective",
    "shared_effective_weights",
]
