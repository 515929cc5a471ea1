"""The last pass of a normalisation's backward, joined with the first of a squeeze-excitation's that stands before it.

In backward the op that reads y = se_residual(...) ends with a pass that writes dy, and se_residual begins with one that reads
dy again, for sums per image. On a GPU both are one launch (`se_residual_dy_`): what reads y finds what se_residual's autograd
node lends, as the node that its x comes from, and leaves the sums there. No tensor is kept for it: what is lent is what
autograd keeps anyway, by weak references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef


class Lent:
    """What a node of se_residual has as `lent`: the tensors that it keeps for backward, x first. They are dead where autograd
    has not kept them as they are (a checkpoint computes them again), or no longer."""

    def __init__(self, residual_scale: float, *tensors: Tensor | None) -> None:
        self.residual_scale = residual_scale
        self._tensors = [None if t is None else TensorWeakRef(t) for t in tensors]
        self._made: tuple[TensorWeakRef, int, Tensor] | None = None

    def tensors(self) -> list[Tensor | None] | None:
        """None where one is dead."""
        found = [None if ref is None else ref() for ref in self._tensors]
        dead = any(t is None and ref is not None for t, ref in zip(found, self._tensors, strict=True))
        return None if dead else found

    def give_back(self, dy: Tensor, shares: Tensor) -> None:
        if not dy.is_inference():  # which says nothing of writes to it
            self._made = TensorWeakRef(dy), dy._version, shares

    def shares(self, dy: Tensor) -> Tensor | None:
        """Those of dy, once, and only where it is the very tensor that they were given back with and nobody wrote to it since:
        not where autograd added another reader's gradient, a hook put its own in place, or a graph is walked again."""
        made, self._made = self._made, None
        if made is None or made[0]() is not dy or made[1] != dy._version:
            return None
        return made[2]


def last_pass(ctx: Any, du: Tensor, x: Tensor, c: Tensor, also: Sequence[Tensor], bn: Tensor | None = None,
              act: int = 0) -> Tensor:  # fmt: skip
    """dx = c0 du' + c1 x + c2 + the `also`, of the x that is the first argument of `ctx`'s function. With the table bn [5, C],
    du' = act'(scale x + shift) du; without, it is du, over which dx is written."""
    raw = torch.ops.nvae_fast
    lent = None if torch.compiler.is_compiling() else _lent_by(ctx)
    tensors = None if lent is None else lent.tensors()
    if tensors is None:
        if bn is not None:
            return raw.bn_act_bwd(du, x, bn, act, c, *also)
        raw.bn_act_affine_(du, x, c, *also)
        return du
    du, dx = (du, torch.empty_like(x, memory_format=torch.channels_last)) if bn is not None else (None, du)
    others = *also, *(None,) * (2 - len(also))
    lent.give_back(dx, raw.se_residual_dy_(dx, du, x, bn, act, c, *others, *tensors, lent.residual_scale))
    return dx


def _lent_by(ctx: Any) -> Lent | None:
    node, output = ctx.next_functions[0]
    lent = getattr(node, "lent", None)
    return lent if output == 0 and isinstance(lent, Lent) else None
