from nvae_fast.kernels.depthwise_conv.api import depthwise_conv

__all__ = ["depthwise_conv"]
