"""One half of a volume-preserving autoregressive flow cell, and the masks of its convolutions."""

from nvae_fast.kernels.flow_cell.api import flow_cell
from nvae_fast.kernels.flow_cell.reference import autoregressive_mask

__all__ = ["autoregressive_mask", "flow_cell"]
