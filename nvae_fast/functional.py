"""The fused operations, flat: `from nvae_fast import functional as F; F.bn_act(...)`."""

from nvae_fast.kernels._norm import Norm
from nvae_fast.kernels.bn_act import bn_act
from nvae_fast.kernels.conv2d import conv2d, preact_branch
from nvae_fast.kernels.depthwise_conv import depthwise_conv
from nvae_fast.kernels.flow_cell import flow_cell, flow_cells
from nvae_fast.kernels.inverted_residual import inverted_residual
from nvae_fast.kernels.logistic_mixture import (
    logistic_mixture_channels,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    logistic_mixture_sample,
)
from nvae_fast.kernels.pointwise_conv import pointwise_conv
from nvae_fast.kernels.power_iteration import power_iteration
from nvae_fast.kernels.residual_normal import (
    ResidualNormalOutput,
    latent_group,
    normal_log_prob,
    normal_params,
    normal_sample,
    residual_normal,
    soft_clamp,
)
from nvae_fast.kernels.se_residual import se_residual
from nvae_fast.kernels.weight_norm import weight_norm

__all__ = [
    "Norm",
    "ResidualNormalOutput",
    "bn_act",
    "conv2d",
    "depthwise_conv",
    "flow_cell",
    "flow_cells",
    "inverted_residual",
    "latent_group",
    "logistic_mixture_channels",
    "logistic_mixture_log_prob",
    "logistic_mixture_mean",
    "logistic_mixture_sample",
    "normal_log_prob",
    "normal_params",
    "normal_sample",
    "pointwise_conv",
    "power_iteration",
    "preact_branch",
    "residual_normal",
    "se_residual",
    "soft_clamp",
    "weight_norm",
]
