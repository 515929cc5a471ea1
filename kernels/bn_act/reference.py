"""bn_act in plain PyTorch: the definition that every other implementation is tested against."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nvae_fast.kernels._norm import Norm


def normalised(x: Tensor, norm: Norm, act: str) -> Tensor:
    """act(norm(x))"""
    options = dict(training=norm.training, momentum=norm.momentum, eps=norm.eps, process_group=norm.process_group)
    moves = (None,) * 3 if norm.finished() else norm[2:5]
    return bn_act(x, *norm[:2], *moves, act=act, offset=norm.offset, **options)


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool,
    momentum: float | None = 0.05,
    eps: float = 1e-5,
    act: str = "swish",
    process_group: dist.ProcessGroup | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """y = act(BN(x + offset)); see `api.bn_act`. On one process the numbers are those of nn.BatchNorm2d, to the bit."""
    work = torch.promote_types(x.dtype, torch.float32)
    rate = 0.0 if momentum is None else momentum
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            rate = 1.0 / float(num_batches_tracked)
    synchronised = training and process_group is not None and dist.get_world_size(process_group) > 1

    with torch.autocast(device_type=x.device.type, enabled=False):
        wide = x.to(work) if offset is None else x.to(work) + offset.to(work).view(1, -1, 1, 1)
        gamma, beta, mean, var = (None if t is None else t.to(work) for t in (weight, bias, running_mean, running_var))
        if synchronised:
            u = _synchronised_batch_norm(wide, gamma, beta, mean, var, rate, eps, process_group)
        else:
            u = F.batch_norm(wide, mean, var, gamma, beta, training or mean is None, rate, eps)
        # `.to(work)` made copies of buffers kept in another dtype: write the new statistics back.
        if training and mean is not None and mean is not running_mean:
            running_mean.copy_(mean)
        if training and var is not None and var is not running_var:
            running_var.copy_(var)
        return ACTIVATIONS[act](u).to(x.dtype)


def _synchronised_batch_norm(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    rate: float,
    eps: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """BN over the joined batch of all processes. Two passes (mean, then squares about it), so nothing cancels."""
    channels = x.shape[1]
    local = torch.cat([x.sum(dim=(0, 2, 3)), x.new_full((1,), x.numel() // max(channels, 1))])
    total = _AllReduceSum.apply(local, group)
    count = total[-1].detach()
    mean = (total[:-1] / count).view(1, -1, 1, 1)
    squares = _AllReduceSum.apply((x - mean).square().sum(dim=(0, 2, 3)), group)
    var = squares / count
    if running_mean is not None and running_var is not None:
        unbiased = squares.detach() / (count - 1).clamp(min=1)
        running_mean.mul_(1 - rate).add_(mean.detach().flatten(), alpha=rate)
        running_var.mul_(1 - rate).add_(unbiased, alpha=rate)
    u = (x - mean) * torch.rsqrt(var + eps).view(1, -1, 1, 1)
    if gamma is not None:
        u = u * gamma.view(1, -1, 1, 1)
    return u if beta is None else u + beta.view(1, -1, 1, 1)


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes. Its gradient is the same sum: every process's loss depends on every process's input."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduceSum.apply(grad, ctx.group), None


ACTIVATIONS = {"swish": F.silu, "elu": F.elu, "identity": lambda u: u}
