"""The halves of volume-preserving autoregressive flow cells, and the masks of their convolutions."""

from nvae_fast.kernels.flow_cell.api import flow_cell, flow_cells
from nvae_fast.kernels.flow_cell.reference import autoregressive_mask

__all__ = ["autoregressive_mask", "flow_cell", "flow_cells"]
