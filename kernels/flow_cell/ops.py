"""Schema, shapes and autograd of `flow_cell`. The native code registers itself for these schemas when it loads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._autograd import first_order
from nvae_fast.kernels._impl import native_predicate

_ARGUMENTS = "Tensor z, Tensor w_in, Tensor w_dw, Tensor w_out, Tensor bias_out"
torch.library.define("nvae_fast::flow_cell_fwd", f"({_ARGUMENTS}) -> Tensor")
torch.library.define("nvae_fast::flow_cell_bwd", f"(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")

cpu_can_run = native_predicate("cpu", torch.float32, torch.bfloat16)
triton_can_run = _triton.can_run
_triton.register("flow_cell", "flow_cell_fwd", "flow_cell_bwd")


@torch.library.register_fake("nvae_fast::flow_cell_fwd")
def _forward_shape(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor) -> Tensor:
    return torch.empty_like(z)


@torch.library.register_fake("nvae_fast::flow_cell_bwd")
def _backward_shapes(dy: Tensor, z: Tensor, w_in: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return torch.empty_like(z), torch.empty_like(w_in), *(w.new_empty(w.shape) for w in others)


class FlowCell(torch.autograd.Function):
    """Keeps its inputs and nothing else; the backward computes the hidden maps again."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.ops.nvae_fast.flow_cell_fwd(*inputs)

    @staticmethod
    @first_order("flow_cell")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.nvae_fast.flow_cell_bwd(dy, *ctx.saved_tensors)
