"""Schemas, shapes and autograd of the latent distribution. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import Predicate, native_predicate, without_gradient

_PARAMETERS = "Tensor mu_q, Tensor log_sigma_q, Tensor? mu_p, Tensor? log_sigma_p, Tensor noise, bool residual"
_GRADIENTS = "Tensor? dz, Tensor? dkl, Tensor? dlog_q, Tensor? dlog_p, Tensor? dmu_p, Tensor? dlog_sigma_p"
_DENSITY = "Tensor z, Tensor? mu, Tensor? log_sigma"

# Gradients come in the order of the parameters; `joined`, those of a mu and its log sigma are the halves of one tensor. bias:
# float32 [2 Z], added to mu_q and log_sigma_q; its gradient comes last.
torch.library.define(
    "nvae_fast::residual_normal_fwd", f"({_PARAMETERS}, Tensor? bias=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "nvae_fast::residual_normal_bwd", f"({_GRADIENTS}, {_PARAMETERS}, bool joined, Tensor? bias=None) -> Tensor[]"
)
torch.library.define("nvae_fast::normal_log_prob_fwd", f"({_DENSITY}, Tensor? log_q) -> Tensor[]")
torch.library.define(
    "nvae_fast::normal_log_prob_bwd", f"(Tensor? dlog_p, Tensor? dkl, Tensor? dz, {_DENSITY}, bool joined) -> Tensor[]"
)
torch.library.define("nvae_fast::normal_sample_fwd", "(Tensor mu, Tensor log_sigma, Tensor noise, float temperature) -> Tensor")

_triton.register(
    "residual_normal",
    *("residual_normal_fwd", "residual_normal_bwd", "normal_log_prob_fwd", "normal_log_prob_bwd", "normal_sample_fwd"),
)


def _noise_is_data(can_run: Predicate) -> Predicate:
    """The noise is the last tensor of a call."""

    def predicate(tensors: Sequence[Tensor]) -> str | None:
        if tensors[-1].requires_grad:
            return "the noise requires a gradient, which only the reference gives"
        return can_run(tensors)

    return predicate


density_on_cpu = native_predicate("cpu", torch.float32, torch.bfloat16)
cpu_can_run = _noise_is_data(density_on_cpu)
triton_can_run = _noise_is_data(_triton.can_run)
triton_can_sample = without_gradient(_triton.can_run)


def _sums(like: Tensor, count: int) -> list[Tensor]:
    return [like.new_empty(like.shape[:2], dtype=torch.float32) for _ in range(count)]


def empty_pairs(pairs: Sequence[tuple[Tensor | None, Tensor | None]], joined: bool) -> list[Tensor]:
    """Memory for the gradients of some mu and log sigma, where they are given: tensors like them or, `joined`, one
    [B, 2 Z, h, w] for each pair, dense."""
    given = [(mu, log_sigma) for mu, log_sigma in pairs if mu is not None and log_sigma is not None]
    if not joined:
        return [torch.empty_like(t) for pair in given for t in pair]
    found = []
    for mu, _ in given:
        b, z, h, w = mu.shape
        form = torch.channels_last if mu.stride(1) == 1 else torch.contiguous_format
        found.append(torch.empty((b, 2 * z, h, w), dtype=mu.dtype, device=mu.device, memory_format=form))
    return found


@torch.library.register_fake("nvae_fast::residual_normal_fwd")
def _forward_shapes(
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None,
    log_sigma_p: Tensor | None,
    noise: Tensor,
    residual: bool,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return torch.empty_like(mu_q), *_sums(mu_q, 3)


@torch.library.register_fake("nvae_fast::residual_normal_bwd")
def _backward_shapes(
    dz: Tensor | None,
    dkl: Tensor | None,
    dlog_q: Tensor | None,
    dlog_p: Tensor | None,
    dmu_p: Tensor | None,
    dlog_sigma_p: Tensor | None,
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None,
    log_sigma_p: Tensor | None,
    noise: Tensor,
    residual: bool,
    joined: bool,
    bias: Tensor | None = None,
) -> list[Tensor]:
    found = empty_pairs(((mu_q, log_sigma_q), (mu_p, log_sigma_p)), joined)
    return found if bias is None else [*found, bias.new_empty(bias.shape)]


@torch.library.register_fake("nvae_fast::normal_log_prob_fwd")
def _log_prob_shapes(z: Tensor, mu: Tensor | None, log_sigma: Tensor | None, log_q: Tensor | None) -> list[Tensor]:
    return _sums(z, 1 if log_q is None else 2)


@torch.library.register_fake("nvae_fast::normal_log_prob_bwd")
def _log_prob_backward_shapes(
    dlog_p: Tensor | None,
    dkl: Tensor | None,
    dz: Tensor | None,
    z: Tensor,
    mu: Tensor | None,
    log_sigma: Tensor | None,
    joined: bool,
) -> list[Tensor]:
    return [torch.empty_like(z), *empty_pairs([(mu, log_sigma)], joined)]


@torch.library.register_fake("nvae_fast::normal_sample_fwd")
def _sample_shape(mu: Tensor, log_sigma: Tensor, noise: Tensor, temperature: float) -> Tensor:
    return torch.empty_like(mu)


def _four(parameters: Sequence[Tensor], joined: bool) -> list[Tensor | None]:
    """mu_q, log_sigma_q, mu_p and log_sigma_p, None where absent: the parameters or, `joined`, their halves."""
    found: list[Tensor | None] = [half for t in parameters for half in (t.chunk(2, 1) if joined else [t])]
    return found + [None] * (4 - len(found))


class ResidualNormal(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward computes what it needs again.

    A joined prior is an output as well, for what else needs it: that gradient then comes here, and is added in the one pass.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """inputs: noise, residual, joined, bias or None, *parameters"""
        # Named in the signature, with two parameters: torch.compile would take ctx for one argument too many, and drop it.
        noise, residual, joined, bias, *parameters = inputs
        ctx.save_for_backward(noise, bias, *parameters)
        ctx.options = residual, joined
        ctx.set_materialize_grads(False)
        found = torch.ops.nvae_fast.residual_normal_fwd(*_four(parameters, joined), noise, residual, bias)
        return (*found, parameters[1].view_as(parameters[1])) if joined and len(parameters) == 2 else found

    @staticmethod
    @first_order("residual_normal")
    def backward(
        ctx: Any,
        dz: Tensor | None,
        dkl: Tensor | None,
        dlog_q: Tensor | None,
        dlog_p: Tensor | None,
        dprior: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        noise, bias, *parameters = ctx.saved_tensors
        residual, joined = ctx.options
        also = (None, None) if dprior is None else dprior.chunk(2, 1)
        found = torch.ops.nvae_fast.residual_normal_bwd(
            dz, dkl, dlog_q, dlog_p, *also, *_four(parameters, joined), noise, residual, joined, bias
        )
        dbias, found = (None, found) if bias is None else (found[-1], found[:-1])
        return None, None, None, dbias, *found


class NormalLogProb(torch.autograd.Function):
    """log p and, given log q, log q - log p and z, an output for what else reads it: that gradient then comes here, added in
    the one pass. Keeps z and the parameters."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        """inputs: z, log_q or None, joined, *parameters"""
        z, log_q, joined, *parameters = inputs  # not in the signature, as above
        ctx.save_for_backward(z, *parameters)
        ctx.joined = joined
        ctx.set_materialize_grads(False)
        found = torch.ops.nvae_fast.normal_log_prob_fwd(z, *_four(parameters, joined)[:2], log_q)
        return tuple(found) if log_q is None else (*found, z.view_as(z))

    @staticmethod
    @first_order("normal_log_prob")
    def backward(
        ctx: Any, dlog_p: Tensor | None, dkl: Tensor | None = None, also: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        z, *parameters = ctx.saved_tensors
        halves = _four(parameters, ctx.joined)[:2]
        dz, *found = torch.ops.nvae_fast.normal_log_prob_bwd(dlog_p, dkl, also, z, *halves, ctx.joined)
        return dz, dkl, None, *found
