"""What the autograd functions of the fused ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def first_order(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of a fused op: as `once_differentiable`, with an error that names the cure. Where no output has a
    gradient, which what reads them may well say, no input has one."""
    message = f"{op}: the fused backward has no derivative of its own: use impl='reference' to differentiate twice"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def guarded(ctx: Any, *grads: Tensor | None) -> Any:
            if all([g is None for g in grads]):
                return (None,) * len(ctx.needs_input_grad)
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            present: Iterator[Tensor] = iter(
                _Refuse.apply(message, *(t.detach().requires_grad_() for t in outputs if isinstance(t, Tensor)))
            )
            return tuple(next(present) if isinstance(t, Tensor) else t for t in outputs)

        return guarded

    return decorate


def thirds(tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Three lists of one length that came end to end."""
    n = len(tensors) // 3
    return tensors[:n], tensors[n : 2 * n], tensors[2 * n :]


class _Refuse(torch.autograd.Function):
    """The identity; its backward raises."""

    @staticmethod
    def forward(ctx: Any, message: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)
