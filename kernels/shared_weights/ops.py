"""Schemas, shapes and autograd of `shared_weights`. On the CPU the node calls the native code of `weight_norm` and
`power_iteration`: a call costs little there, and a copy into a buffer more than it saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nvae_fast.kernels import _lists, _triton
from nvae_fast.kernels._autograd import first_order, thirds
from nvae_fast.kernels._impl import native_predicate
from nvae_fast.kernels.power_iteration.ops import layouts

Term = tuple[str, Tensor | None, Tensor]  # regulariser, u, v
ROW = 64  # values that a part of a buffer begins at a multiple of

_INPUTS = "Tensor[] weights, Tensor?[] log_norms, Tensor?[] masks"

# Results lie in one buffer, as `places` says: outputs of an op may not share memory, and one allocation costs less than many.
torch.library.define("nvae_fast::shared_weights_fwd", f"({_INPUTS}, ScalarType dtype, float eps) -> Tensor")
# The gradients of all weights, then of the log_norms there are, in float32; factors, u and v as the terms have them.
torch.library.define(
    "nvae_fast::shared_weights_bwd",
    f"(Tensor?[] grads, {_INPUTS}, Tensor?[] factors, Tensor?[] u, Tensor?[] v, float eps) -> Tensor",
)

cpu_can_run = native_predicate("cpu", torch.float32)


def triton_can_run(tensors: Sequence[Tensor]) -> str | None:
    if any(t.dtype != torch.float32 for t in tensors):
        return "it takes float32 parameters"
    return _triton.can_run(tensors)


_triton.register("shared_weights", "shared_weights_fwd", "shared_weights_bwd")


class Plan(NamedTuple):
    """What the node needs beside tensors."""

    impl: str
    dtypes: tuple[torch.dtype, ...]
    eps: float
    names: tuple[str, ...]  # of the regularisers
    first: int  # the number that its first weight has among the terms


def cuts(sizes: Sequence[int], limits: Sequence[int]) -> list[slice]:
    """Runs of consecutive items, in order. From the end: each is closed when its sizes reach its limit, the last limit being
    that of all further ones; one run without limits."""
    begins, total, limits = [], 0, list(limits) or [math.inf]
    for i in reversed(range(len(sizes))):
        total += sizes[i]
        if total >= limits[0] or i == 0:
            begins.insert(0, i)
            total, limits = 0, limits[1:] or limits
    return [slice(a, b) for a, b in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def run_when_ready(result: Tensor) -> None:
    """Let the node of `result` go before all others that are ready: autograd prefers those made last, and it was made first.
    Where torch offers no way, it runs after them, with the same numbers."""
    put = getattr(result.grad_fn, "_set_sequence_nr", None)
    if put is not None:
        put(2**62)


def places(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin in a buffer, and its length."""
    *begins, end = _lists.starts([*(-(-n // ROW) * ROW for n in sizes), 0])
    return begins, end


def parts(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a buffer that belong to these tensors, each with its shape and the strides of its dense rows."""
    begins, _ = places(t.numel() for t in tensors)
    return [buffer.as_strided(t.shape, row_strides(t), begin) for t, begin in zip(tensors, begins, strict=True)]


def row_strides(t: Tensor) -> tuple[int, ...]:
    """Those of `_lists.dense_rows(t)`."""
    if t.is_contiguous() or (t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)):
        return t.stride()
    return tuple(math.prod(max(n, 1) for n in t.shape[axis + 1 :]) for axis in range(t.dim()))


@torch.library.register_fake("nvae_fast::shared_weights_fwd")
def _forward_shapes(
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    dtype: torch.dtype,
    eps: float,
) -> Tensor:
    return weights[0].new_empty(places(w.numel() for w in weights)[1], dtype=dtype)


@torch.library.register_fake("nvae_fast::shared_weights_bwd")
def _backward_shapes(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    log_norms: Sequence[Tensor | None],
    *_: Any,
) -> Tensor:
    sizes = [t.numel() for t in (*weights, *log_norms) if t is not None]
    return weights[0].new_empty(places(sizes)[1], dtype=torch.float32)


class Shared(torch.autograd.Function):
    """`apply(plan, terms, *weights, *log_norms, *masks)`, a third each. Returns the values, and a zero for each regulariser.
    Keeps its inputs and nothing else."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, terms: dict[int, Term], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, log_norms, masks = thirds(tensors)
        ctx.save_for_backward(*tensors)
        ctx.plan, ctx.terms = plan, terms
        ctx.set_materialize_grads(False)
        values = [w.detach() for w in weights]  # returned as they are, they would lose the strides of axes of length 1
        for dtype in dict.fromkeys(plan.dtypes):
            which = [
                i
                for i, other in enumerate(plan.dtypes)
                if other == dtype and (log_norms[i] is not None or weights[i].dtype != dtype)
            ]
            if which:
                given = ([ts[i] for i in which] for ts in (weights, log_norms, masks))
                for i, value in zip(which, _FORWARD[plan.impl](*given, dtype, plan.eps), strict=True):
                    values[i] = value
        ctx.learned = [
            w.requires_grad or (norm is not None and norm.requires_grad) for w, norm in zip(weights, log_norms, strict=True)
        ]
        ctx.mark_non_differentiable(*(v for v, learned in zip(values, ctx.learned, strict=True) if not learned))
        zeros = weights[0].new_zeros(len(plan.names)).unbind()
        return *values, *zeros

    @staticmethod
    @first_order("shared_weights")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, log_norms, masks = thirds(ctx.saved_tensors)
        factors = dict(zip(ctx.plan.names, grads[len(weights) :], strict=True))
        own = {i: ctx.terms.get(i + ctx.plan.first) for i in range(len(weights))}
        terms = {i: (factors[t[0]], *t[1:]) for i, t in own.items() if t is not None and factors[t[0]] is not None}
        which = [i for i, learned in enumerate(ctx.learned) if learned and (grads[i] is not None or i in terms)]
        found: list[Tensor | None] = [None] * 2 * len(weights)
        if which:
            given = [[ts[i] for i in which] for ts in (grads, weights, log_norms, masks)]
            some = [terms.get(i, (None, None, None)) for i in which]
            dweights, dnorms = _BACKWARD[ctx.plan.impl](*given, some, ctx.plan.eps)
            for i, dweight, dnorm in zip(which, dweights, dnorms, strict=True):
                found[i] = dweight if ctx.needs_input_grad[2 + i] else None
                found[len(weights) + i] = dnorm if ctx.needs_input_grad[2 + len(weights) + i] else None
        return None, None, *found, *(None for _ in weights)


Lists = Sequence["Tensor | None"]
Terms = Sequence[tuple["Tensor | None", "Tensor | None", "Tensor | None"]]  # factor, u, v


def _forward_cpu(weights: Lists, log_norms: Lists, masks: Lists, dtype: torch.dtype, eps: float) -> list[Tensor]:
    values = list(weights)
    normed = [i for i, norm in enumerate(log_norms) if norm is not None]
    if normed:
        found = torch.ops.nvae_fast.weight_norm_fwd(*([ts[i] for i in normed] for ts in (weights, log_norms, masks)), eps)
        for i, value in zip(normed, found, strict=True):
            values[i] = value
    return [v.to(dtype) for v in values]


def _backward_cpu(
    grads: Lists, weights: Lists, log_norms: Lists, masks: Lists, terms: Terms, eps: float
) -> tuple[list[Tensor], Lists]:
    raw = torch.ops.nvae_fast
    dweights = [None if g is None else g.to(w.dtype) for g, w in zip(grads, weights, strict=True)]
    for own in _lists.grouped([i for i, (_, _, v) in enumerate(terms) if v is not None], lambda i: id(terms[i][0])):
        factor = terms[own[0]][0]
        rows = [weights[i] if weights[i].dim() > 1 else weights[i][None] for i in own]
        others = [g[None] if g is not None and g.dim() == 1 else g for g in (dweights[i] for i in own)]
        one = factor.new_ones(1)
        u = torch.cat([one if terms[i][1] is None else terms[i][1] for i in own])
        v = torch.cat([terms[i][2] for i in own])
        joined = raw.power_iteration_add(others, factor.expand(len(own)), u, v, layouts(rows))
        for i, total in zip(own, joined, strict=True):
            dweights[i] = total[0] if weights[i].dim() == 1 else total
    dnorms: list[Tensor | None] = [None] * len(weights)
    normed = [i for i, norm in enumerate(log_norms) if norm is not None]
    if normed:
        found = raw.weight_norm_bwd(*([ts[i] for i in normed] for ts in (dweights, weights, log_norms, masks)), eps)
        for i, dweight, dnorm in zip(normed, found[: len(normed)], found[len(normed) :], strict=True):
            dweights[i], dnorms[i] = dweight, dnorm
    return dweights, dnorms


def _forward_triton(weights: Lists, log_norms: Lists, masks: Lists, dtype: torch.dtype, eps: float) -> list[Tensor]:
    return parts(torch.ops.nvae_fast.shared_weights_fwd(weights, log_norms, masks, dtype, eps), weights)


def _backward_triton(
    grads: Lists, weights: Lists, log_norms: Lists, masks: Lists, terms: Terms, eps: float
) -> tuple[list[Tensor], Lists]:
    buffer = torch.ops.nvae_fast.shared_weights_bwd(grads, weights, log_norms, masks, *zip(*terms, strict=True), eps)
    found = parts(buffer, [*weights, *(norm for norm in log_norms if norm is not None)])
    rest = iter(found[len(weights) :])
    return found[: len(weights)], [None if norm is None else next(rest) for norm in log_norms]


_FORWARD = {"cpu": _forward_cpu, "triton": _forward_triton}
_BACKWARD = {"cpu": _backward_cpu, "triton": _backward_triton}
