"""NVAE's latent distributions: soft-clamped Normals, sampled and compared in one pass."""

from nvae_fast.kernels.residual_normal.api import (
    ResidualNormalOutput,
    latent_group,
    normal_log_prob,
    normal_params,
    normal_sample,
    residual_normal,
    soft_clamp,
)

__all__ = [
    "ResidualNormalOutput",
    "latent_group",
    "normal_log_prob",
    "normal_params",
    "normal_sample",
    "residual_normal",
    "soft_clamp",
]
