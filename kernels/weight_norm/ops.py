"""Schema, shapes and autograd of `weight_norm`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order, thirds
from nvae_fast.kernels._impl import native_predicate

_INPUTS = "Tensor[] weights, Tensor[] log_norms, Tensor?[] masks"

torch.library.define("nvae_fast::weight_norm_fwd", f"({_INPUTS}, float eps) -> Tensor[]")
torch.library.define("nvae_fast::weight_norm_bwd", f"(Tensor?[] grads, {_INPUTS}, float eps) -> Tensor[]")

cpu_can_run = native_predicate("cpu", torch.float32)
triton_can_run = _triton.can_run
_triton.register("weight_norm", "weight_norm_fwd", "weight_norm_bwd")


@torch.library.register_fake("nvae_fast::weight_norm_fwd")
def _forward_shapes(
    weights: Sequence[Tensor], log_norms: Sequence[Tensor], masks: Sequence[Tensor | None], eps: float
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


@torch.library.register_fake("nvae_fast::weight_norm_bwd")
def _backward_shapes(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    eps: float,
) -> list[Tensor]:
    used = [i for i, g in enumerate(grads) if g is not None]
    return [torch.empty_like(weights[i]) for i in used] + [torch.empty_like(log_norms[i]) for i in used]


class WeightNorm(torch.autograd.Function):
    """`apply(eps, *weights, *log_norms, *masks)`, a third each. Keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, eps: float, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return tuple(torch.ops.nvae_fast.weight_norm_fwd(*thirds(tensors), eps))

    @staticmethod
    @first_order("weight_norm")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = torch.ops.nvae_fast.weight_norm_bwd(grads, *thirds(ctx.saved_tensors), ctx.eps)
        # Only effective weights that were used have gradients; the others' parameters keep none, as in the reference.
        present = iter(found)
        per_input = [None if g is None else next(present) for g in (*grads, *grads)]
        return (None, *per_input, *(None for _ in grads))
