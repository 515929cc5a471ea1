from nvae_fast.kernels.conv2d.api import conv2d, preact_branch

__all__ = ["conv2d", "preact_branch"]
