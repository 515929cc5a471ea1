"""The gradient of many singular values, joined to the other gradients of their weights in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.power_iteration.ops import layouts


class Joint:
    """Adds d sigma_i u_i v_i^T to the gradient of many weights at once, where autograd would make each and add each.

        weights = joint.attach(weights)          # the same values, for all that uses them
        joint.vectors[i] = u_i, v_i              # at any time before the backward
        loss = f(weights) + coefficient * (sigma.sum() + joint.token)

    with sigma of detached weights. `token` is a zero whose gradient is that of the sum of all sigma_i. `claimed` says that a
    sum has taken it: another one cannot share it.
    """

    def __init__(self) -> None:
        self.vectors: dict[int, tuple[Tensor, Tensor]] = {}
        self.claimed = False

    def attach(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """The weights, through which their gradients come by."""
        *weights, self.token = _Join.apply(self.vectors, *weights)
        return weights


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: dict[int, tuple[Tensor, Tensor]], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.vectors = vectors  # not the Joint, which has the token, which has this
        ctx.layouts = [layouts([w]) for w in weights]
        single = all(w.dtype == torch.float32 for w in weights)
        ctx.impl = _impl.resolve_impl("power_iteration", "auto", *weights) if single else "reference"
        ctx.set_materialize_grads(False)
        same = [w.detach() for w in weights]  # returned as they are, they would lose the strides of axes of length 1
        return *same, weights[0].new_zeros((), dtype=torch.promote_types(weights[0].dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *found, dsigma = grads
        if dsigma is not None and ctx.vectors:
            which = sorted(ctx.vectors)
            u, v = ([ctx.vectors[i][k] for i in which] for k in (0, 1))
            others = [found[i] for i in which]
            if ctx.impl != "reference" and not torch.is_grad_enabled():
                parts = [n for i in which for n in ctx.layouts[i]]
                factors = dsigma.expand(len(which)), torch.cat(u), torch.cat(v), parts
                if ctx.impl == "cpu":
                    joined = torch.ops.nvae_fast.power_iteration_add(others, *factors)
                else:
                    joined = torch.ops.nvae_fast.power_iteration_bwd(*factors)
                    both = [k for k, g in enumerate(others) if g is not None]
                    sums = torch._foreach_add([others[k] for k in both], [joined[k] for k in both]) if both else []
                    for k, total in zip(both, sums, strict=True):
                        joined[k] = total
            else:  # torch's operations, which can be differentiated again
                sizes = [ctx.layouts[i][1 : 1 + ctx.layouts[i][0]] for i in which]
                products = [torch.outer(dsigma * a, b).view(size) for a, b, size in zip(u, v, sizes, strict=True)]
                joined = [p if g is None else g + p.to(g.dtype) for p, g in zip(products, others, strict=True)]
            for i, grad in zip(which, joined, strict=True):
                found[i] = grad
        return None, *found
