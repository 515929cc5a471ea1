"""Schema of `adamax_`. The native code registers itself for it when it loads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.kernels._impl import native_predicate

# Returns the numbers of the parameters that it left alone, because one of their five tensors is not a float32 one in memory
# of the CPU. Meta tensors are among those, so that shapes need no function of their own.
torch.library.define(
    "nvae_fast::adamax_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_infs, Tensor(d!)[] steps, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, bool maximize) -> int[]",
)

_compiled = native_predicate("cpu", torch.float32)


def cpu_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cpu"."""
    for t in tensors:
        if t.layout != torch.strided:
            return f"it takes dense tensors, not {t.layout}"
        if type(t) not in PLAIN:
            return f"it takes plain tensors, not {type(t).__name__}"
    return _compiled(tensors)


PLAIN = frozenset((Tensor, torch.nn.Parameter))
"""Types of tensors whose memory is what it seems; a subclass (DTensor, say) has its own idea of an operation."""
