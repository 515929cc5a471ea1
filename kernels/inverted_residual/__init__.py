"""The inverted residual branch of NVAE's cells as one op."""

from nvae_fast.kernels.inverted_residual.api import MEMORY, inverted_residual

__all__ = ["MEMORY", "inverted_residual"]
