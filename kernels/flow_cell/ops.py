"""Schema, shapes and autograd of `flow_cells`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate

# weights: w_in, w_dw, w_out and bias_out of the first cell, of the second, ...; the same sizes and types for all cells.
# fwd: what each cell puts out; all but the last are dense and channels-last.
# bwd: of zs, what each cell takes; dz, then the gradients of `weights`, each laid out like that of the first cell.
torch.library.define("nvae_fast::flow_cell_fwd", "(Tensor z, Tensor[] weights) -> Tensor[]")
torch.library.define("nvae_fast::flow_cell_bwd", "(Tensor dy, Tensor[] zs, Tensor[] weights) -> Tensor[]")

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("flow_cell", "flow_cell_fwd", "flow_cell_bwd")


@torch.library.register_fake("nvae_fast::flow_cell_fwd")
def _forward_shapes(z: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    between = [torch.empty_like(z, memory_format=torch.channels_last) for _ in range(len(weights) // 4 - 1)]
    return [*between, torch.empty_like(z)]


@torch.library.register_fake("nvae_fast::flow_cell_bwd")
def _backward_shapes(dy: Tensor, zs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    w_in, *others = weights[:4]
    gradients = ((torch.empty_like(w_in), *(w.new_empty(w.shape) for w in others)) for _ in zs)
    return [torch.empty_like(zs[0]), *(w for cell in gradients for w in cell)]


class FlowCells(torch.autograd.Function):
    """`apply(z, *weights)`. Keeps its inputs and what passes from cell to cell; the backward computes the hidden maps again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *weights: Tensor) -> Tensor:
        *between, y = torch.ops.nvae_fast.flow_cell_fwd(z, weights)
        ctx.save_for_backward(*weights, z, *between)
        return y

    @staticmethod
    @first_order("flow_cell")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        count = len(ctx.saved_tensors) // 5 * 4
        return tuple(torch.ops.nvae_fast.flow_cell_bwd(dy, ctx.saved_tensors[count:], ctx.saved_tensors[:count]))
