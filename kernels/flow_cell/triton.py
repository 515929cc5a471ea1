"""flow_cell on a GPU: launchers. Kernels: _device.py (forward), _backward.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels.flow_cell._backward import flow_cell_bwd_kernel
from nvae_fast.kernels.flow_cell._device import flow_cell_fwd_kernel
from nvae_fast.kernels.flow_cell._sums import sums

PIXELS = 64  # of a piece of bfloat16; of others half of that, for products of six take registers
BLOCK_H = 64  # hidden channels of a piece of h1, forward
LEAST, MOST = 8, (16, 32)  # side of a tile; MOST: forward, backward, where three maps around a tile are computed again
PROGRAMS = 128  # the largest tiles are taken that give as many programs: about an H100's multiprocessors
TASKS = 128  # most programs of a block of channels, which then take more tiles; forward, where nothing adds up, `_most`


class Plan(NamedTuple):
    """Sizes of a kernel on tiles: a function of shapes and types alone, but for the tasks of the forward."""

    blocks: int  # of hidden channels that programs share out
    tiles: int
    tasks: int
    space: int  # pixels of a tile and the most that may be around it
    hidden: torch.dtype
    constants: dict[str, Any]


def flow_cell_fwd(z: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    cells = _cells(z, weights)
    found = [torch.empty_like(z, memory_format=torch.channels_last) for _ in cells[1:]] + [torch.empty_like(z)]
    if not z.numel():
        return found
    x, plan, hidden = _triton.image("z", z), _plan(z, weights[0], backward=False), weights[0].shape[0]
    block = _triton.power_of_2(max(hidden, 16), BLOCK_H)
    pitch = triton.cdiv(hidden, block) * block
    scratch = _scratch(plan, x, pitch)
    for (w_in, w_dw, w_out, bias_out), result in zip(cells, found, strict=True):
        y = _image_of(result)
        flow_cell_fwd_kernel[(plan.tasks,)](
            *(x, *_dense(w_in, w_dw, w_out), bias_out.contiguous(), y, *scratch),
            *_sizes(plan, z, w_in),
            **plan.constants,
            PITCH=pitch,
            BLOCK_H=block,
        )
        x = y
    if x is not found[-1]:
        found[-1].copy_(x)
    return found


def flow_cell_bwd(dy: Tensor, zs: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    z, w_in, cells = zs[0], weights[0], _cells(zs[0], weights)
    g, images = _triton.image("dy", dy, z), [_triton.image("zs", t, z) for t in zs]
    dz, kept = torch.empty_like(z), _gradients(weights[:4], len(cells))
    found = [dz, *(memory[k] for k in range(len(cells)) for memory in kept)]
    if not z.numel():
        for memory in kept:
            memory.zero_()
        return found
    plan, channels = _plan(z, w_in, backward=True), z.shape[1]
    block_e, block_z = plan.constants["BLOCK_E"], plan.constants["BLOCK_Z"]
    width = max(plan.blocks * block_e, block_z)
    dz_parts = z.new_empty(plan.blocks, z.numel(), dtype=torch.float32)
    parts, tickets, group = sums(z, plan.tasks, plan.blocks, channels, width)
    scratch = _scratch(plan, z, block_e, maps=2)
    for k in reversed(range(len(cells))):
        to = _image_of(torch.empty_like(z, memory_format=torch.channels_last) if k else dz)
        flow_cell_bwd_kernel[(plan.tasks, plan.blocks)](
            *(g, images[k], *_dense(*cells[k][:3]), to, dz_parts, *(memory[k] for memory in kept), parts, tickets, *scratch),
            *_sizes(plan, z, w_in),
            *(*kept[0].stride()[1:], width, group),
            **plan.constants,
        )
        g = to
    if g is not dz:
        dz.copy_(g)
    return found


def _cells(z: Tensor, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The four weights of each cell."""
    channels, hidden = z.shape[1], weights[0].shape[0]
    shapes = (hidden, channels, 3, 3), (hidden, 1, 5, 5), (channels, hidden, 1, 1), (channels,)
    for i, t in enumerate(weights):
        shape, dtype, name = shapes[i % 4], weights[i % 4].dtype, ("w_in", "w_dw", "w_out", "bias_out")[i % 4]
        if t.shape != shape or t.device != z.device or t.dtype != dtype or dtype not in _triton.DTYPES:
            found = f"shape {tuple(t.shape)} and type {t.dtype} on {t.device}"
            wanted = f"{shape} of float32, bfloat16 or float16, the same for all cells, on {z.device}"
            raise RuntimeError(f"{name} of cell {i // 4} has {found}; expected {wanted}")
    return [weights[i : i + 4] for i in range(0, len(weights), 4)]


def _image_of(result: Tensor) -> Tensor:
    """`result` where it is dense and channels-last, else what is to be copied to it."""
    dense = result.is_contiguous(memory_format=torch.channels_last)
    return result if dense else torch.empty_like(result, memory_format=torch.channels_last)


def _gradients(weights: Sequence[Tensor], count: int) -> list[Tensor]:
    """Memory of those of `count` cells, [count, ...], that of w_in laid out like it."""
    w_in, *others = weights
    strides = torch.empty_like(w_in).stride()
    return [
        w_in.new_empty_strided((count, *w_in.shape), (w_in.numel(), *strides)),
        *(w.new_empty(count, *w.shape) for w in others),
    ]


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
        min(tiles, TASKS if backward else _most(z.device)),
        images * min(tile_h + around, height) * min(tile_w + around, width),
        torch.bfloat16 if half else torch.float32,
        dict(PRECISION="tf32" if half else "ieee" if triton.knobs.runtime.interpret else "bf16x6",
             WIDE=z.numel() * blocks >= 2**31 - 2**20, UNIT=_triton.unit(channels), PIXELS=PIXELS if half else PIXELS // 2,
             TILE_N=images, TILE_H=tile_h, TILE_W=tile_w, BLOCK_Z=block_z, BLOCK_K=min(block_z, 32), BLOCK_E=block_e,
             num_warps=8, num_stages=1),
    )  # fmt: skip


def _most(device: torch.device) -> int:
    """As many programs as run at a time, one on a multiprocessor: the scratches of more would not stay in the L2 cache."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else TASKS


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
