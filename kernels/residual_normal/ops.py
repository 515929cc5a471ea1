"""Schema, shapes and autograd of `residual_normal`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import Predicate, native_predicate

_PARAMETERS = "Tensor mu_q, Tensor log_sigma_q, Tensor? mu_p, Tensor? log_sigma_p, Tensor noise, bool residual"
_GRADIENTS = "Tensor? dz, Tensor? dkl, Tensor? dlog_q, Tensor? dlog_p"

torch.library.define("nvae_fast::residual_normal_fwd", f"({_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)")
torch.library.define("nvae_fast::residual_normal_bwd", f"({_GRADIENTS}, {_PARAMETERS}) -> Tensor[]")

_triton.register("residual_normal", "residual_normal_fwd", "residual_normal_bwd")


def _noise_is_data(can_run: Predicate) -> Predicate:
    """The noise is the last tensor of a call."""

    def predicate(tensors: Sequence[Tensor]) -> str | None:
        if tensors[-1].requires_grad:
            return "the noise requires a gradient, which only the reference gives"
        return can_run(tensors)

    return predicate


cpu_can_run = _noise_is_data(native_predicate("cpu", torch.float32, torch.bfloat16))
triton_can_run = _noise_is_data(_triton.can_run)


@torch.library.register_fake("nvae_fast::residual_normal_fwd")
def _forward_shapes(
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None,
    log_sigma_p: Tensor | None,
    noise: Tensor,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kl, log_q, log_p = (mu_q.new_empty(mu_q.shape[:2], dtype=torch.float32) for _ in range(3))
    return torch.empty_like(mu_q), kl, log_q, log_p


@torch.library.register_fake("nvae_fast::residual_normal_bwd")
def _backward_shapes(
    dz: Tensor | None,
    dkl: Tensor | None,
    dlog_q: Tensor | None,
    dlog_p: Tensor | None,
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None,
    log_sigma_p: Tensor | None,
    noise: Tensor,
    residual: bool,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (mu_q, log_sigma_q, mu_p, log_sigma_p) if t is not None]


class ResidualNormal(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward computes what it needs again."""

    @staticmethod
    def forward(
        ctx: Any,
        mu_q: Tensor,
        log_sigma_q: Tensor,
        mu_p: Tensor | None,
        log_sigma_p: Tensor | None,
        noise: Tensor,
        residual: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(mu_q, log_sigma_q, mu_p, log_sigma_p, noise)
        ctx.residual = residual
        ctx.set_materialize_grads(False)
        return torch.ops.nvae_fast.residual_normal_fwd(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, residual)

    @staticmethod
    @first_order("residual_normal")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = torch.ops.nvae_fast.residual_normal_bwd(*grads, *ctx.saved_tensors, ctx.residual)
        return (*found, *(None for _ in range(6 - len(found))))
