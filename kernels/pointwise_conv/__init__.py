from nvae_fast.kernels.pointwise_conv.api import pointwise_conv

__all__ = ["pointwise_conv"]
