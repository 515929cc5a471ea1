"""The latent distribution of one group as a module."""

from __future__ import annotations

from torch import Tensor, nn

from nvae_fast import functional as F


class ResidualNormal(nn.Module):
    """Draws z from the posterior of a latent group and compares it with the prior: `functional.latent_group` on the raw
    outputs of two convolutions, [B, 2 Z, h, w] each, mu first and log sigma second. Without parameters.

    `residual` adds the posterior's outputs to the prior's before they are clamped (NVAE); False takes them as they are.
    """

    def __init__(self, *, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, posterior: Tensor, prior: Tensor | None = None, noise: Tensor | None = None) -> F.ResidualNormalOutput:
        """(z [B, Z, h, w], kl, log_q, log_p [B, Z]); prior None stands for N(0, 1.01); noise None is drawn."""
        return F.latent_group(posterior, prior, noise, residual=self.residual)

    def extra_repr(self) -> str:
        return f"residual={self.residual}"
