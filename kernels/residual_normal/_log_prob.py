"""normal_log_prob on a GPU: kernels, then launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels._join import add_parts, arrive
from nvae_fast.kernels._math import log_positive
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels._triton import line_strides
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


@triton.jit
def prior_of(mu_ptr, log_sigma_ptr, at, inside):
    """(mean, sigma, their slopes); without pointers, those of Normal(0, 0)."""
    if mu_ptr is not None:
        mean, sigma, by_mu, by_log_sigma = normal(load(mu_ptr, at, inside), load(log_sigma_ptr, at, inside))
    else:
        mean, sigma, by_mu, by_log_sigma = 0.0, tl.full(at.shape, 1.01, tl.float32), 1.0, 1.0
    return mean, sigma, by_mu, by_log_sigma


@triton.jit
def residual_normal_log_prob_fwd_kernel(
    z_ptr, mu_p_ptr, log_sigma_p_ptr, log_q_ptr, out_ptr, parts_ptr, tickets_ptr, ROWS, Z, P, CHUNK, TASKS, z_b, z_z, z_p,
    in_b, in_z, in_p, log_q_b, log_q_z, WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """The sums [B Z] of log p and, given log q, log q minus them, CHUNK pixels of an image to a program."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p = offset_of(task, WIDE) * CHUNK + pixel
    log_p = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, CHUNK, STEP):
        inside = used & (p < P)
        mean, sigma, _a, _b = prior_of(
            None if mu_p_ptr is None else mu_p_ptr + b * in_b, None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b,
            z * in_z + p * in_p, inside
        )  # fmt: skip
        v = tl.div_rn(load(z_ptr + b * z_b, z * z_z + p * z_p, inside) - mean, sigma)
        log_p += tl.where(inside, -0.5 * (v * v) - HALF_LOG_2PI - log_positive(sigma), 0.0)
        p += STEP
    row, there = rows_of(Z, TASKS, G, BLOCK_G)
    total = sum_of(log_p, G, STEP, BLOCK_P, BLOCK_G)
    log_q = load_sum(log_q_ptr, row // Z, row % Z, log_q_b, log_q_z, there)
    if parts_ptr is None:
        store_densities(out_ptr, log_q_ptr, ROWS, row, there, total, log_q)
    else:
        tl.store(parts_ptr + task * ROWS + row, total, mask=there)
        if arrive(tickets_ptr + tl.program_id(0) // TASKS, TASKS):
            total = add_parts(parts_ptr, 0, TASKS, row, ROWS, ROWS).to(tl.float32)
            store_densities(out_ptr, log_q_ptr, ROWS, row, there, total, log_q)


@triton.jit
def store_densities(out_ptr, log_q_ptr, ROWS, row, there, log_p, log_q):
    tl.store(out_ptr + row, log_p, mask=there)
    if log_q_ptr is not None:
        tl.store(out_ptr + ROWS + row, log_q - log_p, mask=there)


@triton.jit
def residual_normal_log_prob_bwd_kernel(
    dlog_p_ptr, dkl_ptr, also_ptr, z_ptr, mu_p_ptr, log_sigma_p_ptr, dz_ptr, dmu_p_ptr, dlog_sigma_p_ptr, Z, P, TASKS,
    log_p_b, log_p_z, kl_b, kl_z, also_b, also_z, also_p, z_b, z_z, z_p, in_b, in_z, in_p, dz_b, dz_z, dz_p, out_b, out_z,
    out_p, WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One step of one image."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p = offset_of(task, WIDE) * STEP + pixel
    inside = used & (p < P)
    mean, sigma, by_mu, by_log_sigma = prior_of(
        None if mu_p_ptr is None else mu_p_ptr + b * in_b, None if mu_p_ptr is None else log_sigma_p_ptr + b * in_b,
        z * in_z + p * in_p, inside
    )  # fmt: skip
    inverse = 1.0 / sigma
    v = tl.div_rn(load(z_ptr + b * z_b, z * z_z + p * z_p, inside) - mean, sigma)
    g = load_sum(dlog_p_ptr, b, z, log_p_b, log_p_z, used) - load_sum(dkl_ptr, b, z, kl_b, kl_z, used)
    g = g * inverse
    dz = -g * v
    if also_ptr is not None:
        dz += load(also_ptr + b * also_b, z * also_z + p * also_p, inside)
    store(dz_ptr + b * dz_b, z * dz_z + p * dz_p, dz, inside)
    if mu_p_ptr is not None:
        out = z * out_z + p * out_p
        store(dmu_p_ptr + b * out_b, out, g * v * by_mu, inside)
        store(dlog_sigma_p_ptr + b * out_b, out, g * (v * v - 1.0) * by_log_sigma, inside)


def normal_log_prob_fwd(z: Tensor, mu: Tensor | None, log_sigma: Tensor | None, log_q: Tensor | None) -> list[Tensor]:
    prior, from_, log_q = _prior(z, mu, log_sigma), checked("z", z, z, z.dtype), sums("log_q", log_q, z)
    count = 1 if log_q is None else 2
    if not z.numel():
        zero = z.new_zeros(z.shape[:2], dtype=torch.float32)
        return [zero] if log_q is None else [zero, log_q.clone()]
    tile = Tile(from_)
    found = Sums(count, tile, z)
    residual_normal_log_prob_fwd_kernel[(tile.images * tile.tasks,)](
        *(from_, *prior, log_q, found.out, found.parts, found.tickets, z.shape[0] * z.shape[1], z.shape[1], tile.pixels),
        *(tile.chunk, tile.tasks, *line(from_), *line(prior[0]), *line(log_q, 2)),
        **(tile.constants(from_, *prior) | tile.ends),
    )
    return list(found.out)


def normal_log_prob_bwd(dlog_p: Tensor | None, dkl: Tensor | None, dz: Tensor | None, z: Tensor, mu: Tensor | None,
                        log_sigma: Tensor | None, joined: bool) -> list[Tensor]:  # fmt: skip
    prior, from_ = _prior(z, mu, log_sigma), checked("z", z, z, z.dtype)
    of_sums, also = [sums("dlog_p", dlog_p, z), sums("dkl", dkl, z)], None if dz is None else checked("dz", dz, z, z.dtype)
    found = [torch.empty_like(z), *empty_pairs([(mu, log_sigma)], joined)]
    if not z.numel():
        return found
    grads = [found[0], *(half for t in found[1:] for half in (t.chunk(2, 1) if joined else [t]))]
    out = [t if line_strides(t) else torch.empty_like(t, memory_format=torch.contiguous_format) for t in grads]
    if len(out) == 3 and out[1].stride() != out[2].stride():
        out[2] = torch.empty_like(out[1])
    tile = Tile(from_)
    residual_normal_log_prob_bwd_kernel[(tile.images * tile.steps,)](
        *(*of_sums, also, from_, *prior, *out, *[None] * (3 - len(out)), z.shape[1], tile.pixels, tile.steps),
        *(n for t in of_sums for n in line(t, 2)),
        *(*line(also), *line(from_), *line(prior[0]), *line(out[0]), *line(out[1] if len(out) == 3 else None)),
        **tile.constants(also, from_, *prior, *out),
    )
    for t, done in zip(grads, out, strict=True):
        if t is not done:
            t.copy_(done)
    return found


def _prior(z: Tensor, mu: Tensor | None, log_sigma: Tensor | None) -> list[Tensor | None]:
    if (mu is None) != (log_sigma is None):
        raise RuntimeError("normal_log_prob takes both mu and log_sigma, or neither")
    return alike({"mu": mu, "log_sigma": log_sigma}, z)
