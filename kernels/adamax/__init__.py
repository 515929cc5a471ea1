"""One step of Adamax on many parameters at once."""

from nvae_fast.kernels.adamax.api import adamax_

__all__ = ["adamax_"]
