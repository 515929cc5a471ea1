"""bn_act: batch normalisation followed by an activation, in one op."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.bn_act import reference

ACTIVATIONS = ("swish", "elu", "identity")

_impl.register("bn_act")


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
    impl: str = "auto",
) -> Tensor:
    """y = act(u), u = weight (x - mean) / sqrt(var + eps) + bias, per channel of x [B, C, H, W].

    Training (or no running statistics): mean and biased variance of the batch. Training also moves the running
    statistics in place, once: r <- (1 - momentum) r + momentum (batch mean, unbiased batch variance), and adds one
    to num_batches_tracked. Evaluation: mean and var are the running ones.

    Args:
        x: [B, C, H, W], any strides. y has its shape and dtype; the arithmetic is float32 (float64 for float64).
        weight, bias: [C], or None for 1 and 0.
        running_mean, running_var: [C], both or neither.
        num_batches_tracked: integer scalar, or None. It is needed when momentum is None.
        momentum: weight of the new batch; None averages all batches with equal weight.
        act: "swish" (u sigmoid(u)), "elu" (u, or exp(u) - 1 below 0) or "identity".
        process_group: joins the batches of this group's processes when training; None uses this process's alone.

    Raises:
        ValueError: shapes that do not match, an unknown act, one value per channel in training.

    Source: Ioffe and Szegedy, arXiv 1502.03167; the semantics of torch.nn.BatchNorm2d and SyncBatchNorm.
    """
    _check(x, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, act)
    if (training or running_mean is None) and x.numel() == x.shape[1] and not _shared(process_group):
        raise ValueError(
            f"x of shape {tuple(x.shape)}: batch statistics need more than 1 value per channel; "
            "use a larger batch or training=False"
        )
    _impl.resolve_impl("bn_act", impl, x, weight, bias, running_mean, running_var)
    return reference.bn_act(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training=training,
        momentum=momentum,
        eps=eps,
        act=act,
        process_group=process_group,
    )


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    act: str,
) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected a floating-point [B, C, H, W]")
    if act not in ACTIVATIONS:
        raise ValueError(f"act {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var: expected both or neither; pass None for both to go without")
    named = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, t in named.items():
        if t is not None and t.shape != (x.shape[1],):
            raise ValueError(f"{name} of shape {tuple(t.shape)}: expected ({x.shape[1]},), the channels of x")
    if training and momentum is None and running_mean is not None and num_batches_tracked is None:
        raise ValueError("momentum None averages over all batches: pass num_batches_tracked, or a momentum")


def _shared(process_group: dist.ProcessGroup | None) -> bool:
    return process_group is not None and dist.get_world_size(process_group) > 1
