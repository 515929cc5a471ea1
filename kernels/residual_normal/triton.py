"""residual_normal on a GPU: kernels, then launchers. Any strides with which a map [h, w] is one line of P pixels.

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
from nvae_fast.kernels._join import join_sums
from nvae_fast.kernels._math import exp_of, exp_reduced, log_positive, round_to_step
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels._triton import line_strides

HALF_LOG_2PI = tl.constexpr(0.9189385332046727)
COLUMNS = 512  # of a program, in 4 warps
STEPS = 16  # values that a column adds up at most, in float32; beyond them, float64


@triton.jit
def soft_clamp(a):
    """(c, dc/da) of c = 5 tanh(a / 5): near 0 a polynomial, which keeps all digits of c, else from q = 1 - |c| / 5 =
    2 / (exp(0.4 |a|) + 1), which keeps those of the slope where c rounds to 5."""
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
    c = tl.where(near, x + x * (s * p), 5.0 - 5.0 * q)
    return tl.where(a < 0, -c, c), tl.where(near, 1.0 - 0.04 * (c * c), q * (2.0 - q))


@triton.jit
def normal(mu, log_sigma):
    """(mean, sigma, their derivatives by mu and log_sigma)"""
    mean, by_mu = soft_clamp(mu)
    clamped, by_log_sigma = soft_clamp(log_sigma)
    e = exp_of(clamped)
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
def normals(mu_q_ptr, log_sigma_q_ptr, mu_p_ptr, log_sigma_p_ptr, at, inside, RESIDUAL: tl.constexpr):
    """Posterior and prior with the slopes of `normal`; no prior is Normal(0, 0)."""
    mu, log_sigma = load(mu_q_ptr, at, inside), load(log_sigma_q_ptr, at, inside)
    if mu_p_ptr is not None:
        raw_mu, raw_log_sigma = load(mu_p_ptr, at, inside), load(log_sigma_p_ptr, at, inside)
        if RESIDUAL:
            mu, log_sigma = raw_mu + mu, raw_log_sigma + log_sigma
        mean_p, sigma_p, by_mu_p, by_log_sigma_p = normal(raw_mu, raw_log_sigma)
    else:
        mean_p, sigma_p, by_mu_p, by_log_sigma_p = 0.0, 1.01, 1.0, 1.0
    mean, sigma, by_mu, by_log_sigma = normal(mu, log_sigma)
    return mean, sigma, by_mu, by_log_sigma, mean_p, sigma_p, by_mu_p, by_log_sigma_p


@triton.jit
def store_sum(ptr, columns_, channel0, Z, G: tl.constexpr, STEP: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr):
    """ptr [Z] from channel0 on = the sums over pixels of columns, STEP pixels of G channels."""
    if G == 1:
        tl.store(ptr + channel0, tl.sum(columns_, 0))
    else:
        r = tl.arange(0, BLOCK_P * BLOCK_G)
        p, g = r // BLOCK_G, r % BLOCK_G
        used = (p < STEP) & (g < G)
        found = tl.where(used, tl.gather(columns_, tl.where(used, p * G + g, 0), 0), 0.0)
        channel = channel0 + tl.arange(0, BLOCK_G)
        total = tl.sum(tl.reshape(found, [BLOCK_P, BLOCK_G]), 0)
        tl.store(ptr + channel, total, mask=(tl.arange(0, BLOCK_G) < G) & (channel < Z))


@triton.jit
def residual_normal_fwd_kernel(
    mu_q_ptr, log_sigma_q_ptr, mu_p_ptr, log_sigma_p_ptr, noise_ptr, z_ptr, sums_ptr, ROWS, Z, P, CHUNK, TASKS,
    in_b, in_z, in_p, noise_b, noise_z, noise_p, out_b, out_z, out_p, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """z, and sums [tasks, 3, B Z] of kl, log q and log p over CHUNK pixels."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p = offset_of(task, WIDE) * CHUNK + pixel
    kl = tl.zeros([BLOCK], tl.float32)
    log_q = tl.zeros([BLOCK], tl.float32)
    log_p = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, CHUNK, STEP):
        inside = used & (p < P)
        noise = load(noise_ptr + b * noise_b, z * noise_z + p * noise_p, inside)
        mean, sigma, _a, _b, mean_p, sigma_p, _c, _d = normals(
            mu_q_ptr + b * in_b, log_sigma_q_ptr + b * in_b, None if mu_p_ptr is None else mu_p_ptr + b * in_b,
            None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b, z * in_z + p * in_p, inside, RESIDUAL
        )  # fmt: skip
        drawn, inverse = mean + sigma * noise, 1.0 / sigma_p
        store(z_ptr + b * out_b, z * out_z + p * out_p, drawn, inside)
        d, ratio, v = (mean - mean_p) * inverse, sigma * inverse, (drawn - mean_p) * inverse
        log_ratio, log_sigma = log_positive(ratio), log_positive(sigma)
        # A difference and a product, so that a small KL keeps its digits.
        kl += tl.where(inside, 0.5 * (d * d) + (0.5 * (ratio - 1.0) * (ratio + 1.0) - log_ratio), 0.0)
        lost = 0.0 * (mean + sigma)  # NaN where z is by its parameters, which log_positive loses
        log_q += tl.where(inside, -0.5 * (noise * noise) - HALF_LOG_2PI - log_sigma + lost, 0.0)
        log_p += tl.where(inside, -0.5 * (v * v) - HALF_LOG_2PI - (log_sigma - log_ratio), 0.0)
        p += STEP
    channel0 = tl.program_id(0) // TASKS % tl.cdiv(Z, G) * G
    row = sums_ptr + task * 3 * ROWS + b * Z
    store_sum(row, kl, channel0, Z, G, STEP, BLOCK_P, BLOCK_G)
    store_sum(row + ROWS, log_q, channel0, Z, G, STEP, BLOCK_P, BLOCK_G)
    store_sum(row + 2 * ROWS, log_p, channel0, Z, G, STEP, BLOCK_P, BLOCK_G)


@triton.jit
def load_gradient(ptr, row, used):
    """The gradient of each column's sum; 0 where there is none."""
    if ptr is not None:
        g = tl.load(ptr + row, mask=used, other=0.0)
    else:
        g = 0.0
    return g


@triton.jit
def residual_normal_bwd_kernel(
    dz_ptr, dkl_ptr, dlog_q_ptr, dlog_p_ptr, mu_q_ptr, log_sigma_q_ptr, mu_p_ptr, log_sigma_p_ptr, noise_ptr,
    dmu_q_ptr, dlog_sigma_q_ptr, dmu_p_ptr, dlog_sigma_p_ptr, Z, P, TASKS,
    in_b, in_z, in_p, noise_b, noise_z, noise_p, out_b, out_z, out_p, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
    G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One step of one image. dz lies as the gradients do."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p = offset_of(task, WIDE) * STEP + pixel
    inside, out = used & (p < P), z * out_z + p * out_p
    noise = load(noise_ptr + b * noise_b, z * noise_z + p * noise_p, inside)
    mean, sigma, by_mu, by_log_sigma, mean_p, sigma_p, by_mu_p, by_log_sigma_p = normals(
        mu_q_ptr + b * in_b, log_sigma_q_ptr + b * in_b, None if mu_p_ptr is None else mu_p_ptr + b * in_b,
        None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b, z * in_z + p * in_p, inside, RESIDUAL
    )  # fmt: skip
    inverse_q, inverse = 1.0 / sigma, 1.0 / sigma_p
    d, ratio, v = (mean - mean_p) * inverse, sigma * inverse, (mean + sigma * noise - mean_p) * inverse
    row = b * Z + z
    k, q, s = load_gradient(dkl_ptr, row, used), load_gradient(dlog_q_ptr, row, used), load_gradient(dlog_p_ptr, row, used)
    g = -s * v * inverse
    if dz_ptr is not None:
        g += load(dz_ptr + b * out_b, out, inside)
    dmu = (g + k * d * inverse) * by_mu
    dlog_sigma = (g * noise + k * (ratio * inverse - inverse_q) - q * inverse_q) * by_log_sigma
    store(dmu_q_ptr + b * out_b, out, dmu, inside)
    store(dlog_sigma_q_ptr + b * out_b, out, dlog_sigma, inside)
    if mu_p_ptr is not None:
        dmu_p = (s * v - k * d) * inverse * by_mu_p
        dlog_sigma_p = (k * (1.0 - d * d - ratio * ratio) + s * (v * v - 1.0)) * inverse * by_log_sigma_p
        if RESIDUAL:
            dmu_p, dlog_sigma_p = dmu_p + dmu, dlog_sigma_p + dlog_sigma
        store(dmu_p_ptr + b * out_b, out, dmu_p, inside)
        store(dlog_sigma_p_ptr + b * out_b, out, dlog_sigma_p, inside)


def residual_normal_fwd(mu_q: Tensor, log_sigma_q: Tensor, mu_p: Tensor | None, log_sigma_p: Tensor | None, noise: Tensor,
                        residual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters, noise = _parameters(mu_q, log_sigma_q, mu_p, log_sigma_p), _checked("noise", noise, mu_q, torch.float32)
    z = torch.empty_like(mu_q)
    if not z.numel():
        return z, *z.new_zeros(3, *z.shape[:2], dtype=torch.float32)
    out, tile = z if line_strides(z) else torch.empty_like(z, memory_format=torch.contiguous_format), _Tile(parameters[0])
    # About 1,000 programs where there are that many steps, and short sums.
    tasks, chunk = _triton.tasks(tile.pixels, tile.step, max(1024 // tile.images, triton.cdiv(tile.steps, STEPS)))
    sums, rows = z.new_empty(tasks, 3, *z.shape[:2], dtype=torch.float32), z.shape[0] * z.shape[1]
    residual_normal_fwd_kernel[(tile.images * tasks,)](
        *(*parameters, noise, out, sums, rows, z.shape[1], tile.pixels, chunk, tasks),
        *(line_strides(parameters[0]) + line_strides(noise) + line_strides(out)),
        **tile.constants(residual, *parameters, noise, out),
        BLOCK_P=_triton.power_of_2(tile.step, COLUMNS),
        BLOCK_G=_triton.power_of_2(tile.group, COLUMNS),
    )
    return z if out is z else z.copy_(out), *(sums[0] if tasks == 1 else join_sums(sums))


def residual_normal_bwd(dz: Tensor | None, dkl: Tensor | None, dlog_q: Tensor | None, dlog_p: Tensor | None, mu_q: Tensor,
                        log_sigma_q: Tensor, mu_p: Tensor | None, log_sigma_p: Tensor | None, noise: Tensor,
                        residual: bool) -> list[Tensor]:  # fmt: skip
    parameters, noise = _parameters(mu_q, log_sigma_q, mu_p, log_sigma_p), _checked("noise", noise, mu_q, torch.float32)
    found = [torch.empty_like(t) for t in (mu_q, log_sigma_q, mu_p, log_sigma_p) if t is not None]
    if not mu_q.numel():
        return found
    like = found[0] if line_strides(found[0]) else torch.empty_like(found[0], memory_format=torch.contiguous_format)
    out = [t if t.stride() == like.stride() else torch.empty_like(like) for t in found]
    if dz is not None:
        dz = _checked("dz", dz, mu_q, mu_q.dtype)
        dz = dz if dz.stride() == like.stride() else torch.empty_like(like).copy_(dz)
    sums = [_triton.floats(name, t, *mu_q.shape[:2]) for name, t in (("dkl", dkl), ("dlog_q", dlog_q), ("dlog_p", dlog_p))]
    tile = _Tile(parameters[0])
    residual_normal_bwd_kernel[(tile.images * tile.steps,)](
        *(dz, *sums, *parameters, noise, *out, *[None] * (4 - len(out)), mu_q.shape[1], tile.pixels, tile.steps),
        *(line_strides(parameters[0]) + line_strides(noise) + line_strides(like)),
        **tile.constants(residual, *parameters, noise, like),
    )
    return [t if t is done else t.copy_(done) for t, done in zip(found, out, strict=True)]


class _Tile:
    """How images are cut, from the sizes and from whether the channels of `like` are neighbours: nothing that a run decides."""

    def __init__(self, like: Tensor) -> None:
        batch, channels, self.pixels = like.shape[0], like.shape[1], like.shape[2] * like.shape[3]
        groups = triton.cdiv(channels, 64) if like.stride(1) == 1 else channels
        self.group = triton.cdiv(channels, groups)
        self.images = batch * triton.cdiv(channels, self.group)
        self.step = min(COLUMNS // self.group, self.pixels)
        self.steps = triton.cdiv(self.pixels, self.step)

    def constants(self, residual: bool, *tensors: Tensor | None) -> dict[str, int | bool]:
        block = _triton.power_of_2(self.step * self.group, COLUMNS)
        wide = any(_triton.wide(t) for t in tensors if t is not None)
        return {"RESIDUAL": residual, "WIDE": wide, "G": self.group, "STEP": self.step, "BLOCK": block}


def _checked(name: str, t: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of that shape and type with a map that is one line."""
    if t.dim() != 4 or t.shape != like.shape or t.dtype != dtype:
        raise RuntimeError(f"{name} has shape {tuple(t.shape)} and type {t.dtype}; expected {tuple(like.shape)} and {dtype}")
    return _triton.as_lines(t)


def _parameters(mu_q: Tensor, log_sigma_q: Tensor, *prior: Tensor | None) -> list[Tensor | None]:
    """The four, with the same strides: as they are, or copied."""
    if (prior[0] is None) != (prior[1] is None):
        raise RuntimeError("residual_normal takes both mu_p and log_sigma_p, or neither")
    named = zip(("mu_q", "log_sigma_q", "mu_p", "log_sigma_p"), (mu_q, log_sigma_q, *prior), strict=True)
    given = [None if t is None else _checked(name, t, mu_q, mu_q.dtype) for name, t in named]
    if all(t is None or t.stride() == given[0].stride() for t in given):
        return given
    layout = torch.channels_last if mu_q.stride(1) == 1 else torch.contiguous_format
    return [None if t is None else t.contiguous(memory_format=layout) for t in given]
