"""adamax_: one step of Adamax on many parameters at once, in place.

`impl="auto"` takes "cpu" for every parameter that is float32 on the CPU and so are its gradient and state (measured: README.md
beside this file), and torch's own implementation for the others of the same call, also inside torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.adamax import ops, reference

_impl.register("adamax", cpu=ops.cpu_can_run)

_PROBE = torch.empty(0, dtype=torch.float32, device="cpu")


@torch.no_grad()
def adamax_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_infs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor = 2e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    maximize: bool = False,
    foreach: bool | None = None,
    impl: str = "auto",
) -> None:
    """Per parameter, with its number of steps t counted from 1:

        t <- t + 1,  g = grad (-grad to maximise) + weight_decay param
        exp_avg <- beta1 exp_avg + (1 - beta1) g,  exp_inf <- max(beta2 exp_inf, |g| + eps)
        param <- param - lr / (1 - beta1^t) exp_avg / exp_inf

    `nvae_fast.optim.FusedAdamax` keeps the state and calls this.

    Args:
        params: tensors of any shapes and strides, written in place.
        grads: one for each, of its shape; read only.
        exp_avgs, exp_infs: the state of each, of its shape, zero before the first step; written in place.
        steps: t of each, a tensor of one number on the CPU; written in place.
        lr, beta1, beta2, eps, weight_decay, maximize: as in torch.optim.Adamax.
        foreach: which of torch's implementations steps what the native code does not.
        impl: "auto", "reference" or "cpu" (float32 tensors alone).

    Raises:
        RuntimeError: lists of different lengths, shapes that do not match, sparse gradients, an `impl` that cannot run on these
            tensors. Nothing is written then, except where `use_impl("cpu")` meets parameters that it can step and others.

    Source: Kingma and Ba, arXiv 1412.6980, section 7.1, with eps as torch.optim.Adamax has it.
    """
    lists = (params, grads, exp_avgs, exp_infs, steps)
    if impl == "auto" and (torch.compiler.is_compiling() or not ops.PLAIN.issuperset(map(type, params))):
        impl = "reference"
    # The native code looks at each tensor itself: a predicate in Python would cost more than the step of a small one.
    chosen = _impl.resolve_impl("adamax", impl, *([_PROBE] if impl == "auto" else [t for ts in lists for t in ts]))
    if chosen == "cpu":
        numbers = (float(lr), float(beta1), float(beta2), float(eps), float(weight_decay), maximize)
        left = torch.ops.nvae_fast.adamax_.default(*lists, *numbers)
        if not left:
            return
        lists = tuple([tensors[i] for i in left] for tensors in lists)
        _impl.resolve_impl("adamax", impl, *(t for ts in lists for t in ts))  # raises under use_impl("cpu")
    reference.adamax_(*lists, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, maximize=maximize,
                      foreach=foreach)  # fmt: skip
