"""What the kernels of the latent distribution share on a GPU: which elements a program works on, how their sums are joined, and
the arithmetic. Any strides with which a map [h, w] is one line of P pixels.

A program works on an "image": the pixels of G channels of one batch element, G as many as are neighbours in memory (all that
fit, for channels-last), else 1. Its columns are STEP pixels of G channels, pixel after pixel, so that every lane has work
whatever G is, and a column keeps its channel from step to step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._math import exp_parts, exp_reduced, round_to_step
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels._triton import line_strides

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
COLUMNS = 512  # of a program, in 4 warps
STEPS = 16  # values that a column adds up at most, in float32; beyond them, float64


@triton.jit
def soft_clamp(a):
    """(c, what rounding took from c, dc/da) of c = 5 tanh(a / 5): near 0 a polynomial, which keeps all digits of c, else from
    q = 1 - |c| / 5 = 2 / (exp(0.4 |a|) + 1), which keeps those of the slope where c rounds to 5."""
    x = tl.abs(a)
    x = tl.where(x > 100.0, 100.0, x)
    s = 0.04 * x * x
    p = -0.0062824730 * s + 0.021077758
    p = p * s - 0.053853858
    p = p * s + 0.13332602
    p = p * s - 0.33333319
    # 0.4 x is reduced before it is multiplied out: steps of ln2 / 0.4 = 1.732421875 + 4.460764e-4.
    shifted, n = round_to_step(x, 0.57707801635)
    scale, rest = exp_reduced(shifted, 0.4 * ((x - n * 1.732421875) - n * 4.4607640e-4))
    q = 2.0 / (scale * rest + scale + 1.0)
    near = x < 2.75
    start, step = tl.where(near, x, 5.0), tl.where(near, x * (s * p), -5.0 * q)
    c = start + step
    lost = step - (c - start)
    return tl.where(a < 0, -c, c), tl.where(a < 0, -lost, lost), tl.where(near, 1.0 - 0.04 * (c * c), q * (2.0 - q))


@triton.jit
def normal(mu, log_sigma):
    """(mean, sigma, their derivatives by mu and log_sigma)"""
    mean, _lost, by_mu = soft_clamp(mu)
    clamped, lost, by_log_sigma = soft_clamp(log_sigma)
    scale, p = exp_parts(clamped, lost)  # an error of clamped becomes a relative one
    e = scale + scale * p
    return mean, e + 0.01, by_mu, e * by_log_sigma


@triton.jit
def load(ptr, at, inside):
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, at, value, inside):
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def columns(Z, TASKS, WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """(task of the program's image, batch element, channel and pixel of each column, which columns are used)"""
    image, j = tl.program_id(0) // TASKS, tl.arange(0, BLOCK)
    groups = tl.cdiv(Z, G)
    z = image % groups * G + j % G
    b = offset_of(image // groups, WIDE)
    return tl.program_id(0) % TASKS, b, offset_of(z, WIDE), offset_of(j // G, WIDE), (j < STEP * G) & (z < Z)


@triton.jit
def rows_of(Z, TASKS, G: tl.constexpr, BLOCK_G: tl.constexpr):
    """(row of [B Z] of each channel of the program's image, which channels there are)"""
    image, g = tl.program_id(0) // TASKS, tl.arange(0, BLOCK_G)
    groups = tl.cdiv(Z, G)
    channel = image % groups * G + g
    return image // groups * Z + channel, (g < G) & (channel < Z)


@triton.jit
def sum_of(columns_, G: tl.constexpr, STEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G], the sums over pixels of columns, STEP pixels of G channels."""
    if G > 1:
        r = tl.arange(0, BLOCK_P * BLOCK_G)
        p, g = r // BLOCK_G, r % BLOCK_G
        used = (p < STEP) & (g < G)
        columns_ = tl.where(used, tl.gather(columns_, tl.where(used, p * G + g, 0), 0), 0.0)
    return tl.sum(tl.reshape(columns_, [BLOCK_P, BLOCK_G]), 0)


@triton.jit
def load_sum(ptr, b, z, stride_b, stride_z, used):
    """Of sums [B, Z], or gradients of such, those at b and z; 0 where there are none."""
    if ptr is not None:
        found = tl.load(ptr + b * stride_b + z * stride_z, mask=used, other=0.0)
    else:
        found = 0.0
    return found


class Tile:
    """How images are cut, from the sizes and from whether the channels of `like` are neighbours: nothing that a run decides."""

    def __init__(self, like: Tensor) -> None:
        batch, channels, self.pixels = like.shape[0], like.shape[1], like.shape[2] * like.shape[3]
        groups = triton.cdiv(channels, 64) if like.stride(1) == 1 else channels
        self.group = triton.cdiv(channels, groups)
        self.images = batch * triton.cdiv(channels, self.group)
        self.step = min(COLUMNS // self.group, self.pixels)
        self.steps = triton.cdiv(self.pixels, self.step)
        # The programs of an image, and their pixels: about 1,000 programs where there are that many steps, and short sums.
        wanted = max(1024 // self.images, triton.cdiv(self.steps, STEPS))
        self.tasks, self.chunk = _triton.tasks(self.pixels, self.step, wanted)

    @property
    def ends(self) -> dict[str, int]:
        """The tile [BLOCK_P, BLOCK_G] that adds up the columns of a program; one channel fills it with its own."""
        block = _triton.power_of_2(self.step * self.group, COLUMNS)
        rows = block if self.group == 1 else _triton.power_of_2(self.step, COLUMNS)
        return {"BLOCK_P": rows, "BLOCK_G": _triton.power_of_2(self.group, COLUMNS)}

    def constants(self, *tensors: Tensor | None) -> dict[str, int | bool]:
        block = _triton.power_of_2(self.step * self.group, COLUMNS)
        wide = any(_triton.wide(t) for t in tensors if t is not None)
        return {"WIDE": wide, "G": self.group, "STEP": self.step, "BLOCK": block}


class Sums:
    """Where a kernel puts sums [count, B, Z] over the maps of `like`: `out`, which an image's last program writes from `parts`
    [tasks, count, B, Z]; with one program an image, there are no parts."""

    def __init__(self, count: int, tile: Tile, like: Tensor) -> None:
        shape = count, *like.shape[:2]
        self.out = like.new_empty(shape, dtype=torch.float32)
        join = tile.tasks > 1
        self.parts = like.new_empty((tile.tasks, *shape), dtype=torch.float32) if join else None
        self.tickets = _triton.tickets(like.device, tile.images) if join else None


def checked(name: str, t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape and type with a map that is one line."""
    if t.dim() != 4 or t.shape != like.shape or t.dtype != dtype:
        raise RuntimeError(f"{name} has shape {tuple(t.shape)} and type {t.dtype}; expected {tuple(like.shape)} and {dtype}")
    return _triton.as_lines(t)


def alike(named: dict[str, Tensor | None], like: Tensor) -> list[Tensor | None]:
    """Tensors of one shape and type, with the same strides: as they are, or copied."""
    found = [None if t is None else checked(name, t, like, like.dtype) for name, t in named.items()]
    given = [t for t in found if t is not None]
    if all(t.stride() == given[0].stride() for t in given):
        return found
    layout = torch.channels_last if like.stride(1) == 1 else torch.contiguous_format
    return [None if t is None else t.contiguous(memory_format=layout) for t in found]


def sums(name: str, t: Tensor | None, like: Tensor) -> Tensor | None:
    """A gradient of sums [B, Z], in any strides, or None."""
    if t is not None and (t.shape != like.shape[:2] or t.dtype != torch.float32):
        raise RuntimeError(f"{name} has shape {tuple(t.shape)} and type {t.dtype}; expected float32 {tuple(like.shape[:2])}")
    return t


def line(t: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """Strides of a tensor as the kernels take them; zeros where there is none."""
    if t is None:
        return (0,) * count
    found = line_strides(t) if count == 3 else t.stride()
    assert found is not None
    return found
