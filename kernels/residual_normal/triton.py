"""residual_normal on a GPU: kernels, then launchers. What they share with normal_log_prob's is in _tiles.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels._join import NO_JOIN, add_parts, arrive, join, joined_sums
from nvae_fast.kernels._math import log_positive
from nvae_fast.kernels._tile import offset_of, store_row
from nvae_fast.kernels._triton import floats, line_strides
from nvae_fast.kernels.residual_normal._log_prob import normal_log_prob_bwd, normal_log_prob_fwd
from nvae_fast.kernels.residual_normal._sample import normal_sample_fwd
from nvae_fast.kernels.residual_normal._tiles import (
    HALF_LOG_2PI,
    Sums,
    Tile,
    alike,
    checked,
    columns,
    line,
    load,
    load_sum,
    normal,
    rows_of,
    store,
    sum_of,
    sums,
)
from nvae_fast.kernels.residual_normal.ops import empty_pairs

__all__ = ["normal_log_prob_bwd", "normal_log_prob_fwd", "normal_sample_fwd", "residual_normal_bwd", "residual_normal_fwd"]


@triton.jit
def normals(mu_q_ptr, log_sigma_q_ptr, mu_p_ptr, log_sigma_p_ptr, bias, at, inside, RESIDUAL: tl.constexpr):
    """Posterior and prior with the slopes of `normal`; no prior is Normal(0, 0). bias: added to mu_q and log_sigma_q."""
    mu, log_sigma = load(mu_q_ptr, at, inside) + bias[0], load(log_sigma_q_ptr, at, inside) + bias[1]
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
def biases(bias_ptr, z, Z, used):
    """Of the columns: what is added to mu_q and to log_sigma_q."""
    if bias_ptr is not None:
        found = load(bias_ptr, z, used), load(bias_ptr + Z, z, used)
    else:
        found = 0.0, 0.0
    return found


@triton.jit
def quotients(mean, sigma, z, mean_p, sigma_p):
    """(d, ratio, v), correctly rounded: their squares double the error."""
    return tl.div_rn(mean - mean_p, sigma_p), tl.div_rn(sigma, sigma_p), tl.div_rn(z - mean_p, sigma_p)


@triton.jit
def residual_normal_fwd_kernel(
    mu_q_ptr, log_sigma_q_ptr, mu_p_ptr, log_sigma_p_ptr, noise_ptr, bias_ptr, z_ptr, out_ptr, parts_ptr, tickets_ptr, ROWS, Z,
    P, CHUNK, TASKS, in_b, in_z, in_p, noise_b, noise_z, noise_p, out_b, out_z, out_p, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """z, and the sums [3, B Z] of kl, log q and log p, CHUNK pixels of an image to a program."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p, bias = offset_of(task, WIDE) * CHUNK + pixel, biases(bias_ptr, z, Z, used)
    kl = tl.zeros([BLOCK], tl.float32)
    log_q = tl.zeros([BLOCK], tl.float32)
    log_p = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, CHUNK, STEP):
        inside = used & (p < P)
        noise = load(noise_ptr + b * noise_b, z * noise_z + p * noise_p, inside)
        mean, sigma, _a, _b, mean_p, sigma_p, _c, _d = normals(
            mu_q_ptr + b * in_b, log_sigma_q_ptr + b * in_b, None if mu_p_ptr is None else mu_p_ptr + b * in_b,
            None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b, bias, z * in_z + p * in_p, inside, RESIDUAL
        )  # fmt: skip
        drawn = mean + sigma * noise
        store(z_ptr + b * out_b, z * out_z + p * out_p, drawn, inside)
        d, ratio, v = quotients(mean, sigma, drawn, mean_p, sigma_p)
        log_ratio, log_sigma = log_positive(ratio), log_positive(sigma)
        # A difference and a product, so that a small KL keeps its digits.
        kl += tl.where(inside, 0.5 * (d * d) + (0.5 * (ratio - 1.0) * (ratio + 1.0) - log_ratio), 0.0)
        lost = 0.0 * (mean + sigma)  # NaN where z is by its parameters, which log_positive loses
        log_q += tl.where(inside, -0.5 * (noise * noise) - HALF_LOG_2PI - log_sigma + lost, 0.0)
        log_p += tl.where(inside, -0.5 * (v * v) - HALF_LOG_2PI - (log_sigma - log_ratio), 0.0)
        p += STEP
    row, there = rows_of(Z, TASKS, G, BLOCK_G)
    total_kl, total_q = sum_of(kl, G, STEP, BLOCK_P, BLOCK_G), sum_of(log_q, G, STEP, BLOCK_P, BLOCK_G)
    total_p = sum_of(log_p, G, STEP, BLOCK_P, BLOCK_G)
    if parts_ptr is None:
        store_three(out_ptr, ROWS, row, there, total_kl, total_q, total_p)
    else:
        store_three(parts_ptr + task * 3 * ROWS, ROWS, row, there, total_kl, total_q, total_p)
        if arrive(tickets_ptr + tl.program_id(0) // TASKS, TASKS):
            for i in tl.static_range(3):
                total = add_parts(parts_ptr + i * ROWS, 0, TASKS, row, ROWS, 3 * ROWS)
                tl.store(out_ptr + i * ROWS + row, total.to(tl.float32), mask=there)


@triton.jit
def store_three(ptr, ROWS, row, there, kl, log_q, log_p):
    tl.store(ptr + row, kl, mask=there)
    tl.store(ptr + ROWS + row, log_q, mask=there)
    tl.store(ptr + 2 * ROWS + row, log_p, mask=there)


@triton.jit
def residual_normal_bwd_kernel(
    dz_ptr, dkl_ptr, dlog_q_ptr, dlog_p_ptr, also_mu_p_ptr, also_log_sigma_p_ptr, mu_q_ptr, log_sigma_q_ptr, mu_p_ptr,
    log_sigma_p_ptr, noise_ptr, bias_ptr, dmu_q_ptr, dlog_sigma_q_ptr, dmu_p_ptr, dlog_sigma_p_ptr, dbias_ptr, parts_ptr,
    tickets_ptr, IMAGES, Z, P, TASKS, GROUP, dz_b, dz_z, dz_p, kl_b, kl_z, log_q_b, log_q_z, log_p_b, log_p_z, also_b,
    also_z, also_p, in_b, in_z, in_p, noise_b, noise_z, noise_p, out_b, out_z, out_p, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """One step of one image. The last of all programs of some channels adds up the gradient of their bias."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p, bias = offset_of(task, WIDE) * STEP + pixel, biases(bias_ptr, z, Z, used)
    k, q = load_sum(dkl_ptr, b, z, kl_b, kl_z, used), load_sum(dlog_q_ptr, b, z, log_q_b, log_q_z, used)
    s = load_sum(dlog_p_ptr, b, z, log_p_b, log_p_z, used)
    inside, out = used & (p < P), z * out_z + p * out_p
    noise = load(noise_ptr + b * noise_b, z * noise_z + p * noise_p, inside)
    mean, sigma, by_mu, by_log_sigma, mean_p, sigma_p, by_mu_p, by_log_sigma_p = normals(
        mu_q_ptr + b * in_b, log_sigma_q_ptr + b * in_b, None if mu_p_ptr is None else mu_p_ptr + b * in_b,
        None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b, bias, z * in_z + p * in_p, inside, RESIDUAL
    )  # fmt: skip
    inverse_q, inverse = 1.0 / sigma, 1.0 / sigma_p
    d, ratio, v = quotients(mean, sigma, mean + sigma * noise, mean_p, sigma_p)
    g = -s * v * inverse
    if dz_ptr is not None:
        g += load(dz_ptr + b * dz_b, z * dz_z + p * dz_p, inside)
    dmu = (g + k * d * inverse) * by_mu
    dlog_sigma = (g * noise + k * (ratio * inverse - inverse_q) - q * inverse_q) * by_log_sigma
    store(dmu_q_ptr + b * out_b, out, dmu, inside)
    store(dlog_sigma_q_ptr + b * out_b, out, dlog_sigma, inside)
    if mu_p_ptr is not None:
        dmu_p = (s * v - k * d) * inverse * by_mu_p
        dlog_sigma_p = (k * (1.0 - d * d - ratio * ratio) + s * (v * v - 1.0)) * inverse * by_log_sigma_p
        if RESIDUAL:
            dmu_p, dlog_sigma_p = dmu_p + dmu, dlog_sigma_p + dlog_sigma
        if also_mu_p_ptr is not None:
            dmu_p += load(also_mu_p_ptr + b * also_b, z * also_z + p * also_p, inside)
            dlog_sigma_p += load(also_log_sigma_p_ptr + b * also_b, z * also_z + p * also_p, inside)
        store(dmu_p_ptr + b * out_b, out, dmu_p, inside)
        store(dlog_sigma_p_ptr + b * out_b, out, dlog_sigma_p, inside)
    if dbias_ptr is not None:
        groups, g = tl.cdiv(Z, G), tl.arange(0, BLOCK_G)
        image = tl.program_id(0) // TASKS
        c = tl.where(g < G, image % groups * G + g, Z)
        own = image // groups * TASKS + task
        store_row(parts_ptr, 2 * own, c, Z, sum_of(tl.where(inside, dmu, 0.0), G, STEP, BLOCK_P, BLOCK_G))
        store_row(parts_ptr, 2 * own + 1, c, Z, sum_of(tl.where(inside, dlog_sigma, 0.0), G, STEP, BLOCK_P, BLOCK_G))
        last, d1, d2 = joined_sums(parts_ptr, tickets_ptr, own, image % groups, c, Z, IMAGES * TASKS, GROUP)
        if last:
            store_row(dbias_ptr, 0, c, Z, d1)
            store_row(dbias_ptr, 1, c, Z, d2)


def residual_normal_fwd(mu_q: Tensor, log_sigma_q: Tensor, mu_p: Tensor | None, log_sigma_p: Tensor | None, noise: Tensor,
                        residual: bool,
                        bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    parameters, noise = _parameters(mu_q, log_sigma_q, mu_p, log_sigma_p), checked("noise", noise, mu_q, torch.float32)
    z = torch.empty_like(mu_q)
    if not z.numel():
        return z, *z.new_zeros(3, *z.shape[:2], dtype=torch.float32)
    out, tile = z if line_strides(z) else torch.empty_like(z, memory_format=torch.contiguous_format), Tile(parameters[0])
    found = Sums(3, tile, z)
    residual_normal_fwd_kernel[(tile.images * tile.tasks,)](
        *(*parameters, noise, floats("bias", bias, 2 * z.shape[1]), out, found.out, found.parts, found.tickets),
        *(z.shape[0] * z.shape[1], z.shape[1], tile.pixels),
        *(tile.chunk, tile.tasks, *line(parameters[0]), *line(noise), *line(out)),
        **(tile.constants(*parameters, noise, out) | tile.ends | {"RESIDUAL": residual}),
    )
    return z if out is z else z.copy_(out), *found.out


def residual_normal_bwd(dz: Tensor | None, dkl: Tensor | None, dlog_q: Tensor | None, dlog_p: Tensor | None,
                        dmu_p: Tensor | None, dlog_sigma_p: Tensor | None, mu_q: Tensor, log_sigma_q: Tensor,
                        mu_p: Tensor | None, log_sigma_p: Tensor | None, noise: Tensor, residual: bool,
                        joined: bool, bias: Tensor | None = None) -> list[Tensor]:  # fmt: skip
    bias = floats("bias", bias, 2 * mu_q.shape[1])
    parameters, noise = _parameters(mu_q, log_sigma_q, mu_p, log_sigma_p), checked("noise", noise, mu_q, torch.float32)
    if (dmu_p is None) != (dlog_sigma_p is None) or (mu_p is None and dmu_p is not None):
        raise RuntimeError("residual_normal takes both dmu_p and dlog_sigma_p, with a prior, or neither")
    also = alike({"dmu_p": dmu_p, "dlog_sigma_p": dlog_sigma_p}, mu_q)
    dz = None if dz is None else checked("dz", dz, mu_q, mu_q.dtype)
    of_sums = [sums(name, t, mu_q) for name, t in (("dkl", dkl), ("dlog_q", dlog_q), ("dlog_p", dlog_p))]
    found = empty_pairs(((mu_q, log_sigma_q), (mu_p, log_sigma_p)), joined)
    dbias = None if bias is None else torch.empty_like(bias)
    if not mu_q.numel():
        return found if dbias is None else [*found, dbias.zero_()]
    grads = [half for t in found for half in (t.chunk(2, 1) if joined else [t])]
    like = grads[0] if line_strides(grads[0]) else torch.empty_like(grads[0], memory_format=torch.contiguous_format)
    out = [
        t if t.stride() == like.stride() else like.new_empty_strided(like.shape, like.stride()) for t in grads
    ]  # half of a pair
    tile, (batch, channels) = Tile(parameters[0]), mu_q.shape[:2]
    whole = NO_JOIN if bias is None else join(mu_q, batch * tile.steps, channels, triton.cdiv(channels, tile.group))
    residual_normal_bwd_kernel[(tile.images * tile.steps,)](
        *(dz, *of_sums, *also, *parameters, noise, bias, *out, *[None] * (4 - len(out)), dbias, whole.parts, whole.tickets),
        *(batch, channels, tile.pixels, tile.steps, whole.GROUP),
        *(
            *line(dz),
            *(n for t in of_sums for n in line(t, 2)),
            *line(also[0]),
            *line(parameters[0]),
            *line(noise),
            *line(like),
        ),
        **tile.constants(dz, *also, *parameters, noise, like),
        **tile.ends,
        RESIDUAL=residual,
    )
    for t, done in zip(grads, out, strict=True):
        if t is not done:
            t.copy_(done)
    return found if dbias is None else [*found, dbias]


def _parameters(mu_q: Tensor, log_sigma_q: Tensor, mu_p: Tensor | None, log_sigma_p: Tensor | None) -> list[Tensor | None]:
    if (mu_p is None) != (log_sigma_p is None):
        raise RuntimeError("residual_normal takes both mu_p and log_sigma_p, or neither")
    return alike({"mu_q": mu_q, "log_sigma_q": log_sigma_q, "mu_p": mu_p, "log_sigma_p": log_sigma_p}, mu_q)
