"""shared_weights: what a pass computes with instead of its parameters, from one autograd node or a few.

`impl="auto"` takes "cpu" for float32 parameters on the CPU, "triton" for float32 ones on CUDA where Triton is installed, else
"reference", which is torch's operations one by one and joins nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.kernels import _impl
from nvae_fast.kernels.shared_weights import ops
from nvae_fast.kernels.weight_norm import weight_norm

_impl.register("shared_weights", cpu=ops.cpu_can_run, triton=ops.triton_can_run)

REGULARISERS = ("spectral", "norm")


class SharedWeights:
    """The parameters of a pass in the types that it computes in, and the gradients of their regularisers joined to the others.

        shared = SharedWeights(weights, log_norms, masks, dtypes)
        zero = shared.claim("spectral")                 # None: without joining, or claimed before
        shared.terms[i] = "spectral", u_i, v_i          # at any time before the backward
        loss = f(shared.values) + coefficient * (sigma.sum() + zero)

    values[i] is `weight_norm` of weights[i] where there is a log_norm, else weights[i] itself, in dtypes[i]. The gradient of
    `zero` is that of sum_i sigma_i, sigma_i = u_i^T W_i v_i having been computed without gradient: u_i v_i^T is added to that
    of W_i = values[i], seen as a matrix (shape[0], rest), in the pass that takes it to its parameter. The term of a vector is
    (name, None, v): v itself.

    Autograd alone takes a launch for each cast, and for each its gradient, and makes and adds each u v^T.

    Gradients of the parameters of a node come together, when the last value of it has its own. With `limits` there are several
    nodes, cut from the end of the list (whose gradients come first, if it is in the order of the pass), and each runs as soon
    as it can.

    Args:
        weights: L tensors of any shape; those with a log_norm have two axes or more.
        log_norms, masks: as in `weight_norm`, None where a weight is taken as it is.
        dtypes: the type of each value.
        eps: of `weight_norm`.
        limits: bytes of the gradients of a node at which it is full: the first for the node at the end of the list, the last
            for all that remain; () for one node.
        impl: "auto", "reference", "cpu", "triton" (float32 parameters). The reference alone can be differentiated twice.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        log_norms: Sequence[Tensor | None],
        masks: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        *,
        eps: float = 1e-5,
        limits: Sequence[int] = (),
        impl: str = "auto",
    ) -> None:
        if not len(weights) == len(log_norms) == len(masks) == len(dtypes):
            counts = f"{len(weights)} weights, {len(log_norms)} log_norms, {len(masks)} masks, {len(dtypes)} dtypes"
            raise ValueError(f"{counts}: expected one of each for every weight; None stands for no log_norm and no mask")
        masks = [
            None if m is None else m.to(torch.promote_types(w.dtype, torch.float32))
            for w, m in zip(weights, masks, strict=True)
        ]
        self._inputs = list(weights), list(log_norms), masks, eps
        self.terms: dict[int, ops.Term] = {}
        self._zeros: dict[str, list[Tensor]] = {}
        self._matrices: list[Tensor] | None = None
        learned = any(t is not None and t.requires_grad for t in (*weights, *log_norms))
        # torch.compile fuses casts itself
        reference = not weights or torch.compiler.is_compiling()
        self.impl = "reference" if reference else _impl.resolve_impl("shared_weights", impl, *weights, *log_norms)
        if self.impl == "reference":
            self.values = [w.to(dtype) for w, dtype in zip(self._normalised(), dtypes, strict=True)]
            return
        self.values = []
        for part in ops.cuts([w.numel() * w.element_size() for w in weights], limits):
            plan = ops.Plan(self.impl, tuple(dtypes[part]), eps, REGULARISERS, part.start)
            # the terms, not self, which has the zeros, which have them
            found = ops.Shared.apply(plan, self.terms, *weights[part], *log_norms[part], *masks[part])
            values, zeros = found[: -len(REGULARISERS)], found[-len(REGULARISERS) :]
            self.values += values
            if learned and torch.is_grad_enabled():
                ops.run_when_ready(zeros[0])
                for name, zero in zip(REGULARISERS, zeros, strict=True):
                    self._zeros.setdefault(name, []).append(zero)

    def claim(self, regulariser: str) -> Tensor | None:
        """The zero through which that regulariser gets its gradients; it is given away once."""
        zeros = self._zeros.pop(regulariser, None)
        return zeros if zeros is None else zeros[0] if len(zeros) == 1 else torch.stack(zeros).sum()

    def matrix(self, i: int) -> Tensor:
        """values[i] in the type of its weight, without gradient."""
        weights, log_norms, _, _ = self._inputs
        if self.values[i].dtype == weights[i].dtype:
            return self.values[i].detach()
        if log_norms[i] is None:
            return weights[i].detach()
        if self._matrices is None:
            with torch.no_grad():
                self._matrices = self._normalised(narrow=True)
        return self._matrices[i]

    def _normalised(self, *, narrow: bool = False) -> list[Tensor]:
        """All weights in their own types, with gradients; with `narrow` normalised only where the value is of another type."""
        weights, log_norms, masks, eps = self._inputs
        which = [
            i for i, w in enumerate(weights) if log_norms[i] is not None and not (narrow and self.values[i].dtype == w.dtype)
        ]
        found = list(weights)
        normalised = weight_norm(*([ts[i] for i in which] for ts in (weights, log_norms, masks)), eps=eps)
        for i, w in zip(which, normalised, strict=True):
            found[i] = w
        return found
