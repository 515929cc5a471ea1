"""flow_cell on a GPU: launchers. Kernels: _device.py (forward), _backward.py.

The hidden maps of some images at a time are in a scratch of SCRATCH values at most (or one image's, where that is more).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels.flow_cell._backward import (
    flow_cell_da1_kernel,
    flow_cell_da2_kernel,
    flow_cell_dw_kernel,
    flow_cell_dz_kernel,
    flow_cell_join_kernel,
)
from nvae_fast.kernels.flow_cell._device import flow_cell_fwd_kernel, flow_cell_hidden_kernel, flow_cell_pack_kernel

SCRATCH = 1 << 24
PIXELS = 64  # of a tile of bfloat16, 8 x 8 or what there is; of others half of that, for products of six take registers
BLOCK_K = 32  # of the 3 Z values of z under a row of the kernel
TASKS, TASKS_IN = 256, 64  # of the sums over pixels, a chunk: of w_in there are 9 Z rows a task, of the rest Z + 26


class Plan(NamedTuple):
    """Sizes of one call: a function of shapes and types alone."""

    images: int  # of a chunk
    tiles: int  # of a chunk
    pitch: int
    hidden: torch.dtype
    shared: dict[str, Any]  # constants of every kernel on tiles
    precision: str
    block_z: int

    @property
    def across(self) -> int:
        return self.pitch // self.shared["BLOCK_E"]

    @property
    def width(self) -> int:
        return max(self.pitch, self.block_z)


class Packed(NamedTuple):
    w_in: Tensor
    w_dw: Tensor
    w_out: Tensor
    live: Tensor


def flow_cell_fwd(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor) -> Tensor:
    _check(z, w_in, w_dw, w_out, bias_out)
    result = torch.empty_like(z)
    if not z.numel():
        return result
    x, bias, plan = _triton.image("z", z), bias_out.contiguous(), _plan(z, w_in)
    packed, y = _pack(plan, w_in, w_dw, w_out), torch.empty_like(x)
    h1 = x.new_empty(plan.images * z.shape[2] * z.shape[3], plan.pitch, dtype=plan.hidden)
    for some, to in zip(x.split(plan.images), y.split(plan.images), strict=True):
        _hidden(plan, some, packed, h1)
        flow_cell_fwd_kernel[(plan.tiles,)](
            *(some, h1, packed.w_dw, packed.w_out, packed.live, bias, to, *_sizes(some)),
            **plan.shared,
            PRECISION=plan.precision,
            BLOCK_Z=plan.block_z,
        )
    return y if y.stride() == result.stride() else result.copy_(y)


def flow_cell_bwd(
    dy: Tensor, z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(z, w_in, w_dw, w_out, bias_out)
    dz, gradients = torch.empty_like(z), [w.new_zeros(w.shape) for w in (w_in, w_dw, w_out, bias_out)]
    x, g = _triton.image("z", z), _triton.image("dy", dy, z)
    if not z.numel():
        return dz, *gradients
    plan, channels = _plan(z, w_in), z.shape[1]
    packed, to = _pack(plan, w_in, w_dw, w_out), torch.empty_like(x)
    h1, da2 = x.new_empty(2, plan.images * z.shape[2] * z.shape[3], plan.pitch, dtype=plan.hidden)
    (tasks, tiles), (tasks_in, tiles_in) = (_triton.tasks(plan.tiles, 1, n) for n in (TASKS, TASKS_IN))
    chunks = triton.cdiv(len(x), plan.images)
    parts = x.new_empty(chunks, tasks, 25 + channels + 1, plan.width, dtype=torch.float32)
    parts_in = x.new_empty(chunks, tasks_in, 9 * channels, plan.pitch, dtype=torch.float32)
    dots = plan.shared | {"PRECISION": plan.precision}
    for chunk, (some, gs, target) in enumerate(zip(*(t.split(plan.images) for t in (x, g, to)), strict=True)):
        sizes, ends = _sizes(some), (tiles, plan.tiles, plan.width)
        _hidden(plan, some, packed, h1)
        flow_cell_da2_kernel[(tasks, plan.across)](
            *(gs, h1, packed.w_dw, packed.w_out, packed.live, da2, parts[chunk], *sizes, *ends),
            **dots,
            BLOCK_Z=plan.block_z,
        )
        flow_cell_da1_kernel[(tasks, plan.across)](
            *(da2, h1, packed.w_dw, packed.live, parts[chunk], *sizes, *ends), **plan.shared, num_warps=8
        )
        flow_cell_dz_kernel[(plan.tiles,)](*(gs, h1, packed.w_in, packed.live, target, *sizes), **dots, BLOCK_Z=plan.block_z)
        flow_cell_dw_kernel[(tasks_in, plan.across, 3 * triton.cdiv(3 * channels, BLOCK_K))](
            *(some, h1, parts_in[chunk], *sizes, tiles_in, plan.tiles), **dots, BLOCK_K=BLOCK_K
        )
    flow_cell_join_kernel[(10 * channels + 26, triton.cdiv(plan.width, 64))](
        *(parts_in, parts, *gradients, channels, w_in.shape[0], chunks * tasks_in, chunks * tasks, plan.width),
        PITCH=plan.pitch,
        BLOCK_T=16,
        BLOCK_C=64,
    )
    return to if to.stride() == dz.stride() else dz.copy_(to), *gradients


def _check(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor) -> None:
    channels, hidden = z.shape[1], w_in.shape[0]
    shapes = (hidden, channels, 3, 3), (hidden, 1, 5, 5), (channels, hidden, 1, 1), (channels,)
    named = zip(("w_in", "w_dw", "w_out", "bias_out"), (w_in, w_dw, w_out, bias_out), shapes, strict=True)
    for name, t, shape in named:
        if t.shape != shape or t.device != z.device or t.dtype not in _triton.DTYPES:
            found = f"shape {tuple(t.shape)} and type {t.dtype} on {t.device}"
            raise RuntimeError(f"{name} has {found}; expected {shape} of float32, bfloat16 or float16 on {z.device}")


def _plan(z: Tensor, w_in: Tensor) -> Plan:
    batch, channels, height, width = z.shape
    block_e = max(_triton.power_of_2(w_in.shape[0], 32), 16)
    pitch = max(triton.cdiv(w_in.shape[0], block_e), 1) * block_e
    images = min(max(SCRATCH // (height * width * pitch), 1), batch)
    half = z.dtype == torch.bfloat16
    pixels = PIXELS if half else PIXELS // 2
    tile_w = min(_triton.power_of_2(width, pixels), pixels // _triton.power_of_2(height, pixels // 8))
    tile_h = _triton.power_of_2(height, pixels // tile_w)
    tiles = triton.cdiv(width, tile_w) * triton.cdiv(height, tile_h) * triton.cdiv(images, pixels // (tile_h * tile_w))
    return Plan(
        images,
        tiles,
        pitch,
        torch.bfloat16 if half else torch.float32,
        dict(WIDE=images * height * width * pitch >= 2**31 - 2**20, PITCH=pitch, PIXELS=pixels, TILE_H=tile_h, TILE_W=tile_w,
             BLOCK_E=block_e),
        "tf32" if half else "ieee" if triton.knobs.runtime.interpret else "bf16x6",
        max(_triton.power_of_2(channels, 1 << 30), 16),
    )  # fmt: skip


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[2], x.shape[3], x.shape[1]


def _pack(plan: Plan, w_in: Tensor, w_dw: Tensor, w_out: Tensor) -> Packed:
    channels, pitch = w_in.shape[1], plan.pitch
    packed = Packed(
        *(w_in.new_empty(rows, pitch, dtype=torch.float32) for rows in (9 * channels, 25, plan.block_z)),
        w_in.new_empty(34, dtype=torch.int64),
    )
    strides = *w_in.stride(), w_dw.stride(0), *w_dw.stride()[2:], *w_out.stride()[:2]
    flow_cell_pack_kernel[(35,)](
        *(w_in, w_dw, w_out, *packed, channels, w_in.shape[0], *strides),
        PITCH=pitch,
        BLOCK_Z=plan.block_z,
        BLOCK_E=plan.shared["BLOCK_E"],
    )
    return packed


def _hidden(plan: Plan, x: Tensor, packed: Packed, h1: Tensor) -> None:
    flow_cell_hidden_kernel[(plan.tiles, plan.across)](
        *(x, packed.w_in, packed.live, h1, *_sizes(x)), **plan.shared, PRECISION=plan.precision, BLOCK_K=BLOCK_K
    )
