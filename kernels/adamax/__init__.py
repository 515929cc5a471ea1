"""One step of Adamax on many parameters at once."""

from nvae_fast.kernels.adamax.api import Arena, fits

__all__ = ["Arena", "fits"]
