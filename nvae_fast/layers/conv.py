"""Weight-normalised convolutions, plain and masked (autoregressive)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.kernels.flow_cell.reference import autoregressive_mask
from nvae_fast.kernels.pointwise_conv.api import resolve
from nvae_fast.layers.shared import NORM_EPS, effective


class WeightNormConv2d(nn.Conv2d):
    """Conv2d whose filters are rescaled to a learned norm: w_eff[o] = exp(l[o]) * w[o] / (||w[o]|| + 1e-5).

    Adds the parameter `log_weight_norm` l of shape (out_channels, 1, 1, 1) after `weight` and `bias`, initialised to
    log(||w[o]|| + 0.01). With `data_init`, the first forward call first sets l and the bias such that the output has mean 0
    and standard deviation 0.2 per channel (Salimans & Kingma 2016); loading a state marks this as done.

    `adds_bias`, which may be set at any time: where it is False, what reads the output adds the bias (as a cell's ops do, and a
    latent group, which read it anyway) and forward returns it without.
    """

    def __init__(self, *args, data_init: bool = False, adds_bias: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.log_weight_norm = nn.Parameter(self._initial_log_norm())
        self.data_init_pending, self.adds_bias = data_init, adds_bias
        self.effective: Tensor | None = None  # set by shared_effective_weights for the duration of a pass

    @torch.no_grad()
    def _initial_log_norm(self) -> Tensor:
        norm = self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        return torch.log(norm + 1e-2)

    @property
    def mask(self) -> Tensor | None:
        """Zeros where the filter must not look (None: nowhere)."""
        return None

    def effective_weight(self) -> Tensor:
        """The normalised (and masked) filters that forward convolves with."""
        return self.normalised() if self.effective is None else self.effective

    def normalised(self) -> Tensor:
        """The same in the type of the weight, computed anew."""
        return F.weight_norm([self.weight], [self.log_weight_norm], [self.mask], eps=NORM_EPS)[0]

    def own_bias(self) -> Tensor | None:
        """The bias that forward adds."""
        return effective(self, "bias") if self.adds_bias else None

    @property
    def left_bias(self) -> Tensor | None:
        """The bias that forward leaves to what reads its output."""
        return None if self.adds_bias else self.bias

    @property
    def pointwise(self) -> bool:
        """Whether every pixel is transformed by itself, and `product` is what forward does."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def product(self, x: Tensor, *, return_stats: bool = False, **options: Any) -> Any:
        """`functional.pointwise_conv` of x. `return_stats`: return (y, its statistics[, x]), None where they do not come for
        nothing."""
        weight = self.effective_weight()
        stats = return_stats and resolve(x, weight) != "reference"
        found = F.pointwise_conv(x, weight, self.own_bias(), return_stats=stats, **options)
        if stats or not return_stats:
            return found
        y, *rest = found if isinstance(found, tuple) else (found,)
        return y, None, *rest

    @torch.no_grad()
    def _init_from_data(self, x: Tensor) -> None:
        norm = self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        y = self._conv_forward(x.to(self.weight.dtype), self.weight / (norm + NORM_EPS), None)
        mean, std = y.mean((0, 2, 3)), 5 * y.std((0, 2, 3))
        if dist.is_available() and dist.is_initialized():
            for stat in (mean, std):
                dist.all_reduce(stat)
                stat /= dist.get_world_size()
        if self.bias is not None:
            self.bias.copy_(-mean / (std + NORM_EPS))
        self.log_weight_norm.copy_(-torch.log(std + NORM_EPS).view(-1, 1, 1, 1))
        self.data_init_pending = False

    def forward(self, x: Tensor) -> Tensor:
        if self.data_init_pending:
            self._init_from_data(x)
        return self.product(x) if self.pointwise else self._conv_forward(x, self.effective_weight(), self.own_bias())

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.data_init_pending = False


class MaskedConv2d(WeightNormConv2d):
    """Weight-normalised convolution that sees only pixels before the current one (raster order; after it with `mirror`).

    Stride 1, "same" padding. At the centre pixel, output channel block i sees the input blocks 0..i, or 0..i-1 with
    `strict`. The mask enters before the norm and is not part of the state_dict. `log_norm_shift` is added to the initial l.
    """

    full_precision = True  # flows compute in that of their weights, whatever autocast says

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1, bias: bool = False,
                 strict: bool = False, mirror: bool = False, log_norm_shift: float = 0.0) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, groups=groups, bias=bias)
        mask = autoregressive_mask(out_channels, in_channels, kernel_size, groups, strict=strict, mirror=mirror)
        self.register_buffer("_mask", mask, persistent=False)
        with torch.no_grad():
            norm = (self.weight * mask).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            self.log_weight_norm.copy_(torch.log(norm + 1e-2) + log_norm_shift)

    @property
    def mask(self) -> Tensor:
        return self._mask


def same_padding(kernel_size: int, dilation: int = 1) -> int:
    """The padding that keeps the size at stride 1."""
    return dilation * (kernel_size - 1) // 2


LOG_TENTH = math.log(0.1)
