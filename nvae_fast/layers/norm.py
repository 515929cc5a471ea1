"""Batch normalisation with its activation, on one process or joined over several."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.kernels._constant import constant
from nvae_fast.kernels._norm import ACTIVATIONS
from nvae_fast.layers.shared import effective


class BatchNormAct2d(nn.BatchNorm2d):
    """nn.BatchNorm2d followed by an activation: y = act(gamma * (x - mean) / sqrt(var + eps) + beta).

    `act` is "swish" (u * sigmoid(u)), "elu" or "identity". Parameters, buffers and numbers are those of nn.BatchNorm2d, whose
    arguments it takes. In training, statistics are those of the batch, and the running ones move by `momentum`.

    `sync` joins the batches of all processes of `process_group` (None: of all there are) when training, as nn.SyncBatchNorm
    does; `convert_sync_batch_norm` sets it throughout a model.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device=None, dtype=None, *, act: str = "swish", sync: bool = False,
                 process_group: dist.ProcessGroup | None = None) -> None:  # fmt: skip
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if act not in ACTIVATIONS:
            raise ValueError(f"act {act!r}: expected one of {', '.join(ACTIVATIONS)}")
        self.act, self.sync, self.process_group = act, sync, process_group

    @property
    def norm(self) -> F.Norm:
        """This normalisation, without its activation, as the fused ops take it."""
        # As in nn.BatchNorm2d, where tracking that was switched off later still leaves the statistics for evaluation.
        tracked = self.track_running_stats and self.running_mean is not None
        mean, var = (self.running_mean, self.running_var) if tracked or not self.training else (None, None)
        group = None
        if self.sync and self.training and dist.is_available() and dist.is_initialized():
            group = self.process_group or dist.group.WORLD
        return F.Norm(
            effective(self), self.bias, mean, var,
            self.num_batches_tracked if self.training and tracked else None,
            self.training or mean is None, self.momentum, self.eps, group,
        )  # fmt: skip

    def forward(self, x: Tensor, stats: Tensor | None = None, **options: int) -> Any:
        """`stats`: of x where the op before has returned them, as `functional.Norm` takes them; `options`: `return_x` of
        `functional.bn_act`."""
        self._check_input_dim(x)
        n = self.norm
        return F.bn_act(x, *n[:5], training=n.training, momentum=n.momentum, eps=n.eps, act=self.act,
                        process_group=n.process_group, stats=stats, **options)  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act}" + (", sync" if self.sync else "")

    @property
    def qconfig(self) -> None:
        """Asked for by torch.nn.SyncBatchNorm.convert_sync_batchnorm while it copies a batch norm, and the place to stop it."""
        raise TypeError(
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm would drop the activation of a BatchNormAct2d: "
            "use nvae_fast.layers.convert_sync_batch_norm"
        )


def convert_sync_batch_norm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, *, sync: bool = True
) -> nn.Module:
    """Every BatchNormAct2d of `module` joins its batch statistics over `process_group` (None: all processes) from now on, or
    with sync=False stops doing so. Any other nn.BatchNorm2d is left alone: torch's own conversion takes care of those. In
    place; returns `module`."""
    for m in module.modules():
        if isinstance(m, BatchNormAct2d):
            m.sync, m.process_group = sync, process_group if sync else None
    return module


def bn_regularizer(bns: list[nn.BatchNorm2d]) -> Tensor:
    """Sum over BN layers of max_c |gamma_c|; 0 without layers."""
    if not bns:
        return torch.zeros(())
    joints = [getattr(bn, "joint", None) for bn in bns]
    shared = joints[0] and joints[0][0]
    alike = shared and all(j and j[0] is shared for j in joints) and len(set(joints)) == len(bns)  # a slope each
    zero = shared.claim("norm") if alike else None
    if zero is None:
        return _largest(torch.cat([bn.weight for bn in bns]), bns)
    # Its gradient joins that of the normalisations on the way to the parameters: as autograd's, which takes twice the passes.
    weights = torch.cat([bn.weight.detach() for bn in bns])
    layer, sizes = _layers(weights, bns), weights.abs()
    largest = weights.new_zeros(len(bns)).scatter_reduce(0, layer, sizes, "amax", include_self=False)
    among = (sizes == largest[layer]).to(weights.dtype)
    slopes = weights.sgn() * among / torch.zeros_like(largest).scatter_add(0, layer, among)[layer]
    for (_, number), slope in zip(joints, slopes.split([bn.num_features for bn in bns]), strict=True):
        shared.terms[number] = "norm", None, slope
    return largest.sum() + zero


def _largest(weights: Tensor, bns: list[nn.BatchNorm2d]) -> Tensor:
    """The sum of the largest |gamma| of each layer, of all gamma end to end."""
    layer = _layers(weights, bns)
    # as max does, its gradient is shared evenly among the largest
    return weights.new_zeros(len(bns)).scatter_reduce(0, layer, weights.abs(), "amax", include_self=False).sum()


def _layers(weights: Tensor, bns: list[nn.BatchNorm2d]) -> Tensor:
    """The number of the layer of each of `weights`, which are all gamma end to end."""
    sizes = tuple(bn.num_features for bn in bns)
    count = weights.numel()
    return constant(sizes, weights, lambda: torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=count))
