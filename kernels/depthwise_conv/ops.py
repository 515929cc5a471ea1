"""Schemas and shapes of `depthwise_conv`. The native code registers itself for these schemas when it loads.

A CUDA tensor has two implementations. `depthwise_conv_fwd` and `_bwd` are one there, `depthwise_conv_cuda_fwd` and `_bwd` the
C++ one (impl="cuda"), with the same arguments and a `variant` that tests and measurements may force (0: by the table in
csrc/depthwise_conv/depthwise_cuda.cu; 1 any, 2 core, 3 tensor). Each is one launch, whose blocks count themselves with tickets
(`_triton.tickets`): the C++ is registered for schemas `_counted`, which have them as their first argument.

The backward of a normalisation behind y enters as c [3, C]: g = c0 dy + c1 y + c2. The backward returns the gradient du of the
normalised x (of x without bn), the weight's, and the table of gradients [7, C] of the normalisation before it (bn_act/ops.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._impl import load_native, native_predicate
from nvae_fast.kernels._norm import FOLLOWING, Following
from nvae_fast.kernels.bn_act.ops import GRADIENTS, empty_image

_INPUT = "Tensor x, Tensor? bn, int act, Tensor weight, int stride, int dilation, int upsample"
torch.library.define("nvae_fast::depthwise_conv_fwd", f"({_INPUT}, bool stats, {FOLLOWING}) -> (Tensor, Tensor)")
torch.library.define(
    "nvae_fast::depthwise_conv_bwd", f"(Tensor dy, Tensor? y, Tensor? c, {_INPUT}, float count=0.) -> (Tensor, Tensor, Tensor)"
)
torch.library.define(  # du in the memory of dy: stride 1, no upsampling
    "nvae_fast::depthwise_conv_bwd_",
    "(Tensor(a!) dy, Tensor? y, Tensor? c, Tensor x, Tensor? bn, int act, Tensor weight, int dilation, float count=0.) "
    "-> (Tensor, Tensor)",
)


def counted(name: str) -> Callable[..., Any]:
    """The schema `name` as its C++ runs it."""

    def launch(image: Tensor, *others: Any, **options: Any) -> Any:
        tickets = _triton.tickets(image.device, -(-image.shape[1] // 32) * 33)  # as tickets_of in depthwise_cuda.h
        return getattr(torch.ops.nvae_fast, f"{name}_counted")(tickets, image, *others, **options)

    return launch


for _name, _arguments, _results in (
    ("depthwise_conv_cuda_fwd", f"{_INPUT}, bool stats, {FOLLOWING}, int variant=0", "(Tensor, Tensor)"),
    (
        "depthwise_conv_cuda_bwd",
        f"Tensor dy, Tensor? y, Tensor? c, {_INPUT}, float count=0., int variant=0",
        "(Tensor, Tensor, Tensor)",
    ),
):
    torch.library.define(f"nvae_fast::{_name}", f"({_arguments}) -> {_results}")
    torch.library.define(f"nvae_fast::{_name}_counted", f"(Tensor(t!) tickets, {_arguments}) -> {_results}")
    torch.library.impl(f"nvae_fast::{_name}", "cuda")(counted(_name))

triton_can_run = _triton.can_run
_triton.register("depthwise_conv", "depthwise_conv_fwd", "depthwise_conv_bwd", "depthwise_conv_bwd_")

MAX_KERNEL = 11
MAX_CUDA_KERNEL = 27
_compiled = native_predicate("cpu", torch.float32, torch.bfloat16)
_compiled_cuda = native_predicate("cuda", torch.float32, torch.bfloat16, torch.float16)


def raw_name(impl: str) -> str:
    """The schemas that this implementation runs are nvae_fast::<raw_name>_fwd and _bwd."""
    return "depthwise_conv_cuda" if impl == "cuda" else "depthwise_conv"


def cpu_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cpu" on (x, weight)."""
    if len(tensors) > 1 and tensors[1].shape[-1] > MAX_KERNEL:
        return f"it takes kernels up to {MAX_KERNEL}, not {tensors[1].shape[-1]}"
    return _compiled(tensors)


def cuda_can_run(tensors: Sequence[Tensor]) -> str | None:
    """Predicate of impl="cuda" on (x, weight)."""
    if len(tensors) > 1 and tensors[1].shape[-1] > MAX_CUDA_KERNEL:
        return f"it takes kernels up to {MAX_CUDA_KERNEL}, not {tensors[1].shape[-1]}"
    return _compiled_cuda(tensors) or _no_cuda_code() or (_triton._too_old(tensors[0].device.index or 0) if tensors else None)


@functools.cache
def _no_cuda_code() -> str | None:
    if load_native()[0].build_info()["cuda"]:
        return None
    return "the native extension was built without CUDA (reinstall with NVAE_FAST_BUILD=cuda, where nvcc and a CUDA torch are)"


vars(_no_cuda_code)["_dynamo_marked_constant"] = True  # see _impl.py


@torch.library.register_fake("nvae_fast::depthwise_conv_fwd")
def _forward_shapes(
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    stride: int,
    dilation: int,
    upsample: int,
    stats: bool,
    *following: Any,
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    y = empty_image(x, n, c, (h * upsample - 1) // stride + 1, (w * upsample - 1) // stride + 1)
    return y, x.new_empty(Following(*following).rows(stats), c, dtype=torch.float32)


@torch.library.register_fake("nvae_fast::depthwise_conv_cuda_fwd")
def _cuda_forward_shapes(*args: Any, variant: int = 0) -> tuple[Tensor, Tensor]:
    return _forward_shapes(*args[: 8 + len(Following._fields)])


@torch.library.register_fake("nvae_fast::depthwise_conv_cuda_bwd")
@torch.library.register_fake("nvae_fast::depthwise_conv_bwd")
def _backward_shapes(
    dy: Tensor,
    y: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    stride: int,
    dilation: int,
    upsample: int,
    count: float = 0.0,
    variant: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    table = x.new_empty(0 if bn is None else GRADIENTS, x.shape[1], dtype=torch.float32)
    return empty_image(x, *x.shape), weight.new_empty(weight.shape), table


@torch.library.register_fake("nvae_fast::depthwise_conv_bwd_")
def _backward_in_place_shapes(
    dy: Tensor,
    y: Tensor | None,
    c: Tensor | None,
    x: Tensor,
    bn: Tensor | None,
    act: int,
    weight: Tensor,
    dilation: int,
    count: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return _backward_shapes(dy, y, c, x, bn, act, weight, 1, dilation, 1)[1:]
