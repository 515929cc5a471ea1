"""flow_cell on a GPU: launchers. Kernels: _device.py (forward), _backward.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels.flow_cell._backward import flow_cell_bwd_kernel, flow_cell_join_kernel
from nvae_fast.kernels.flow_cell._device import flow_cell_fwd_kernel

PIXELS = 64  # of a piece of bfloat16; of others half of that, for products of six take registers
BLOCK_H = 64  # hidden channels of a piece of h1, forward
LEAST, MOST = 8, (16, 32)  # side of a tile; MOST: forward, backward, where three maps around a tile are computed again
PROGRAMS = 128  # the largest tiles are taken that give as many programs: about an H100's multiprocessors
TASKS = (
    512,
    128,
)  # most programs (backward: of a block of channels, each with 10 Z + 26 rows of sums), which then take more tiles
BLOCK = 1024  # values of dz that a program adds up


class Plan(NamedTuple):
    """Sizes of a kernel on tiles: a function of shapes and types alone."""

    blocks: int  # of hidden channels that programs share out
    tiles: int
    tasks: int
    space: int  # pixels of a tile and the most that may be around it
    hidden: torch.dtype
    constants: dict[str, Any]


def flow_cell_fwd(z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor) -> Tensor:
    _check(z, w_in, w_dw, w_out, bias_out)
    result = torch.empty_like(z)
    if not z.numel():
        return result
    x, plan = _triton.image("z", z), _plan(z, w_in, backward=False)
    y, block = torch.empty_like(x), _triton.power_of_2(max(w_in.shape[0], 16), BLOCK_H)
    pitch = triton.cdiv(w_in.shape[0], block) * block
    flow_cell_fwd_kernel[(plan.tasks,)](
        *(x, *_dense(w_in, w_dw, w_out), bias_out.contiguous(), y, *_scratch(plan, x, pitch)),
        *_sizes(plan, z, w_in),
        **plan.constants,
        PITCH=pitch,
        BLOCK_H=block,
    )
    return y if y.stride() == result.stride() else result.copy_(y)


def flow_cell_bwd(
    dy: Tensor, z: Tensor, w_in: Tensor, w_dw: Tensor, w_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(z, w_in, w_dw, w_out, bias_out)
    x, g = _triton.image("z", z), _triton.image("dy", dy, z)
    dz, d_in = torch.empty_like(z), torch.empty_like(w_in)
    gradients = d_in, *(w.new_empty(w.shape) for w in (w_dw, w_out, bias_out))
    if not z.numel():
        return dz, *(w.zero_() for w in gradients)
    plan, to, channels = _plan(z, w_in, backward=True), torch.empty_like(x), z.shape[1]
    block_e, block_z = plan.constants["BLOCK_E"], plan.constants["BLOCK_Z"]
    width = max(plan.blocks * block_e, block_z)
    dz_parts = x.new_empty(plan.blocks, x.numel(), dtype=torch.float32)
    parts = x.new_empty(plan.tasks, 10 * channels + 26, width, dtype=torch.float32)
    flow_cell_bwd_kernel[(plan.tasks, plan.blocks)](
        *(g, x, *_dense(w_in, w_dw, w_out), dz_parts, parts, *_scratch(plan, x, block_e, maps=2)),
        *_sizes(plan, z, w_in),
        width,
        **plan.constants,
    )
    rows = (10 * channels + 26) * triton.cdiv(width, 64)
    flow_cell_join_kernel[(rows + triton.cdiv(x.numel(), BLOCK),)](
        *(g, dz_parts, parts, to, *gradients),
        *(x.numel(), plan.blocks, channels, w_in.shape[0], *d_in.stride(), plan.tasks, width),
        WIDE=plan.constants["WIDE"],
        BLOCK=BLOCK,
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


def _plan(z: Tensor, w_in: Tensor, backward: bool) -> Plan:
    batch, channels, height, width = z.shape
    half = z.dtype == torch.bfloat16
    block_e = max(_triton.power_of_2(w_in.shape[0], 32), 16)
    block_z = max(_triton.power_of_2(channels, 1 << 30), 16)
    blocks = max(triton.cdiv(w_in.shape[0], block_e), 1) if backward else 1
    side = MOST[backward]
    while True:
        tile_h, tile_w = (_triton.power_of_2(n, side) for n in (height, width))
        images = _triton.power_of_2(batch, max(LEAST * LEAST // (tile_h * tile_w), 1))
        tiles = triton.cdiv(batch, images) * triton.cdiv(height, tile_h) * triton.cdiv(width, tile_w)
        if tiles * blocks >= PROGRAMS or side == LEAST:
            break
        side //= 2
    around = 10 if backward else 4
    return Plan(
        blocks,
        tiles,
        min(tiles, TASKS[backward]),
        images * min(tile_h + around, height) * min(tile_w + around, width),
        torch.bfloat16 if half else torch.float32,
        dict(PRECISION="tf32" if half else "ieee" if triton.knobs.runtime.interpret else "bf16x6",
             WIDE=z.numel() * blocks >= 2**31 - 2**20, UNIT=_triton.unit(channels), PIXELS=PIXELS if half else PIXELS // 2,
             TILE_N=images, TILE_H=tile_h, TILE_W=tile_w, BLOCK_Z=block_z, BLOCK_K=min(block_z, 32), BLOCK_E=block_e,
             num_warps=8, num_stages=1),
    )  # fmt: skip


def _scratch(plan: Plan, x: Tensor, pitch: int, maps: int = 1) -> tuple[Tensor, Tensor]:
    """Of each program: hidden maps, and w_dw."""
    programs = plan.tasks * plan.blocks
    return x.new_empty(programs, maps, plan.space, pitch, dtype=plan.hidden), x.new_empty(
        programs, 32, pitch, dtype=torch.float32
    )


def _dense(w_in: Tensor, w_dw: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As the weights of a channels-last model are."""
    return w_in.contiguous(memory_format=torch.channels_last), w_dw.contiguous(), w_out.contiguous()


def _sizes(plan: Plan, z: Tensor, w_in: Tensor) -> tuple[int, ...]:
    return z.shape[0], z.shape[2], z.shape[3], z.shape[1], w_in.shape[0], plan.tiles, plan.space
