"""bn_act: batch normalisation followed by an activation, in one op.

`impl="auto"` takes "cpu" for float32 and bfloat16 images on the CPU where its row in `kernels/_auto.py` holds,
"triton" for float32, bfloat16 and float16 images on CUDA where Triton is installed, else "reference".
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from nvae_fast.kernels import _auto, _check, _impl, _norm
from nvae_fast.kernels.bn_act import ops, reference

ACTIVATIONS = _norm.ACTIVATIONS

_impl.register("bn_act", triton=ops.triton_can_run, cpu=ops.cpu_can_run)


@_check.typed
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
    stats: Tensor | None = None,
    offset: Tensor | None = None,
    return_x: int = 0,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
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
        stats: mean and biased variance [2, C] of x where another op has returned them, or the table [5, C] of this
            normalisation (`Norm`); the reference takes its own.
        offset: [C] or None, a bias that x lacks: the normalisation is of x + offset. Statistics of the batch take it away
            again: the running mean alone moves by it, and its gradient is 0.
        return_x: how many others read x too, 2 at most: return (y, x) or (y, x, x), for each of them one. The gradients that
            come back to them are added in the last pass of this backward, which saves the passes of autograd's additions.
        impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too); both keep x and 5 C floats for
            backward. The reference alone can be differentiated twice.

    Raises:
        ValueError: shapes that do not match, an unknown act, one value per channel in training.
        RuntimeError: an `impl` that cannot run.

    Source: Ioffe and Szegedy, arXiv 1502.03167; the semantics of torch.nn.BatchNorm2d and SyncBatchNorm.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected a floating-point [B, C, H, W]")
    if act not in ACTIVATIONS:
        raise ValueError(f"act {act!r}: expected one of {', '.join(ACTIVATIONS)}")
    norm = _norm.Norm(
        weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps, process_group, stats, offset
    )
    _norm.check_norm(norm, x, x.shape[1], "x")
    values = x.numel() // max(x.shape[1], 1)
    _norm.check_batch(norm, values, x.shape)
    readers = _norm.check_readers(return_x)
    impl = _auto.choose("bn_act", impl, [x])
    if _impl.resolve_impl("bn_act", impl, x) == "reference":
        y = reference.normalised(x, norm, act)
        return (y, *[x] * readers) if readers else y
    y, *passed = ops.BnAct.apply(x, _norm.config(norm), ACTIVATIONS.index(act), readers, *_norm.tensors(norm))
    return (y, *_norm.shared(x, x, passed)) if readers else y
