"""The fused ops, each with a plain-PyTorch reference beside it. Nothing in here knows NVAE."""

if __name__ != "nvae_fast.kernels":
    raise ImportError("`kernels` is part of nvae_fast: import nvae_fast.kernels")

from nvae_fast.kernels._impl import use_impl

__all__ = ["use_impl"]
