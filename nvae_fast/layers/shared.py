"""What the modules of a pass compute with instead of their parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae_fast.kernels._impl import resolve_impl
from nvae_fast.kernels.shared_weights import SharedWeights

NORM_EPS = 1e-5
BUCKETS = 2**20, 25 * 2**20  # bytes: the first that DistributedDataParallel sends during a backward, and each other one
PLACES = {"weight": "effective", "bias": "effective_bias"}  # attributes for the duration of a pass, by parameter


def effective(module: nn.Module, name: str = "weight") -> Tensor | None:
    """What `module` computes with instead of that parameter: what the pass around it shares, or the parameter itself."""
    shared = getattr(module, PLACES[name], None)
    return getattr(module, name) if shared is None else shared


@contextmanager
def shared_effective_weights(modules: Iterable[nn.Conv2d | nn.BatchNorm2d]) -> Iterator[None]:
    """Inside, all convolutions share one computation of their weights, normalised where they are, in the type that autocast has
    now; gradients of the regularisers of their weights and of the batch norms join the others on their way to the parameters.

    One process has them all from one autograd node. Several, which send gradients while the backward pass runs, have a node for
    each `BUCKETS` of gradients, in the order of the `modules`, which should be about that of the pass.

    Convolutions that are still to be initialised from data are passed over. Nested uses share the outer. Autocast must not
    change inside.
    """
    joins = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    found = [i for m in modules for i in (_of_convolution if isinstance(m, nn.Conv2d) else _of_norm)(m, joins)]
    if found:
        normalised = [i.name == "weight" and hasattr(i.module, "log_weight_norm") for i in found]
        shared = SharedWeights(
            [getattr(i.module, i.name) for i in found],
            [i.module.log_weight_norm if n else None for i, n in zip(found, normalised, strict=True)],
            [i.module.mask if n else None for i, n in zip(found, normalised, strict=True)],
            [i.dtype for i in found],
            eps=NORM_EPS,
            limits=BUCKETS if joins and sends_gradients() else (),
        )
        for number, (item, value) in enumerate(zip(found, shared.values, strict=True)):
            _put(item.module, PLACES[item.name], value)
            if joins and item.name == "weight":
                _put(item.module, "joint", (shared, number))
    try:
        yield
    finally:
        for item in found:
            _put(item.module, PLACES[item.name], None)
            if joins:
                _put(item.module, "joint", None)


def sends_gradients() -> bool:
    """Whether there are other processes that gradients go to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _put(module: nn.Module, name: str, value: object) -> None:
    """As setattr, whose search for parameters takes a millisecond for the modules of a small model."""
    if torch.compiler.is_compiling():
        setattr(module, name, value)
    else:
        vars(module)[name] = value


class _Item(NamedTuple):
    module: nn.Module
    name: str
    dtype: torch.dtype


def _of_convolution(conv: nn.Conv2d, joins: bool) -> Iterator[_Item]:
    """The parameters that a pass is better off not to take as they are; none where an outer pass shares them."""
    if vars(conv).get("data_init_pending") or vars(conv).get(PLACES["weight"]) is not None:
        return
    own, dtype = conv.weight.dtype, _compute_dtype(conv)
    if dtype != own or joins or hasattr(conv, "log_weight_norm"):
        yield _Item(conv, "weight", dtype)
    if dtype != own and conv.bias is not None and vars(conv).get("adds_bias", True):
        yield _Item(conv, "bias", dtype)


def _of_norm(norm: nn.BatchNorm2d, joins: bool) -> Iterator[_Item]:
    if joins and norm.weight is not None and effective(norm) is norm.weight:
        yield _Item(norm, "weight", norm.weight.dtype)


def _compute_dtype(conv: nn.Conv2d) -> torch.dtype:
    """The type that autocast would give its weight."""
    own, kind = conv.weight.dtype, conv.weight.device.type
    if getattr(conv, "full_precision", False) or own == torch.float64 or torch.compiler.is_compiling() or kind == "meta":
        return own
    if not torch.is_autocast_enabled(kind) or resolve_impl("shared_weights", "auto", conv.weight) == "reference":
        return own  # the reference would cast one by one, as autocast does, and then lack the weights that were not cast
    return torch.get_autocast_dtype(kind)
