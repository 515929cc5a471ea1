"""Schemas, shapes and autograd of the mixture. The native code registers itself when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import Predicate, native_predicate, without_gradient

_INPUTS = "Tensor x, Tensor params, int num_mixtures, int num_bits, bool fixed"

torch.library.define("nvae_fast::logistic_mixture_log_prob_fwd", f"({_INPUTS}) -> Tensor")
torch.library.define("nvae_fast::logistic_mixture_log_prob_bwd", f"(Tensor grad, {_INPUTS}) -> Tensor")
torch.library.define(
    "nvae_fast::logistic_mixture_sample_fwd",
    "(Tensor params, Tensor u_mixture, Tensor u_logistic, int num_mixtures, float temperature, float factor) -> Tensor",
)

_triton.register(
    "logistic_mixture", "logistic_mixture_log_prob_fwd", "logistic_mixture_log_prob_bwd", "logistic_mixture_sample_fwd"
)


def _x_is_data(can_run: Predicate) -> Predicate:
    """x is the first tensor of a call."""

    def predicate(tensors: Sequence[Tensor]) -> str | None:
        if tensors[0].requires_grad:
            return "x requires a gradient, which only the reference gives"
        return can_run(tensors)

    return predicate


cpu_can_run = _x_is_data(native_predicate("cpu", torch.float32, torch.bfloat16))
triton_can_run = _x_is_data(_triton.can_run)
triton_can_sample = without_gradient(_triton.can_run)


@torch.library.register_fake("nvae_fast::logistic_mixture_log_prob_fwd")
def _forward_shape(x: Tensor, params: Tensor, num_mixtures: int, num_bits: int, fixed: bool) -> Tensor:
    return x.new_empty((x.shape[0], *x.shape[2:]))


@torch.library.register_fake("nvae_fast::logistic_mixture_log_prob_bwd")
def _backward_shape(grad: Tensor, x: Tensor, params: Tensor, num_mixtures: int, num_bits: int, fixed: bool) -> Tensor:
    return torch.empty_like(params)


@torch.library.register_fake("nvae_fast::logistic_mixture_sample_fwd")
def _sample_shape(
    params: Tensor, u_mixture: Tensor, u_logistic: Tensor, num_mixtures: int, temperature: float, factor: float
) -> Tensor:
    return params.new_empty(u_logistic.shape, dtype=torch.float32)


class LogisticMixtureLogProb(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward computes what it needs again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, num_mixtures: int, num_bits: int, fixed: bool) -> Tensor:
        ctx.save_for_backward(x, params)
        ctx.settings = num_mixtures, num_bits, fixed
        return torch.ops.nvae_fast.logistic_mixture_log_prob_fwd(x, params, num_mixtures, num_bits, fixed)

    @staticmethod
    @first_order("logistic_mixture_log_prob")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dparams = torch.ops.nvae_fast.logistic_mixture_log_prob_bwd(grad, *ctx.saved_tensors, *ctx.settings)
        return None, dparams, None, None, None
