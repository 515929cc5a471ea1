from nvae_fast.kernels.conv2d.api import conv2d

__all__ = ["conv2d"]
