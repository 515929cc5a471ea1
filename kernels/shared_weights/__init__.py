"""The weights of a pass: computed, cast and joined to their regularisers by one autograd node."""

from nvae_fast.kernels.shared_weights.api import SharedWeights

__all__ = ["SharedWeights"]
