"""normal_sample on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels._triton import line_strides
from nvae_fast.kernels.residual_normal._tiles import Tile, alike, checked, columns, line, load, normal, store


@triton.jit
def residual_normal_sample_kernel(
    mu_p_ptr, log_sigma_p_ptr, noise_ptr, z_ptr, Z, P, TASKS, temperature, in_b, in_z, in_p, noise_b, noise_z, noise_p, out_b,
    out_z, out_p, WIDE: tl.constexpr, G: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One step of one image."""
    task, b, z, pixel, used = columns(Z, TASKS, WIDE, G, STEP, BLOCK)
    p = offset_of(task, WIDE) * STEP + pixel
    inside, at = used & (p < P), z * in_z + p * in_p
    mean, sigma, _a, _b = normal(load(mu_p_ptr + b * in_b, at, inside), load(log_sigma_p_ptr + b * in_b, at, inside))
    noise = load(noise_ptr + b * noise_b, z * noise_z + p * noise_p, inside)
    store(z_ptr + b * out_b, z * out_z + p * out_p, mean + temperature * sigma * noise, inside)


def normal_sample_fwd(mu: Tensor, log_sigma: Tensor, noise: Tensor, temperature: float) -> Tensor:
    parameters, noise = alike({"mu": mu, "log_sigma": log_sigma}, mu), checked("noise", noise, mu, torch.float32)
    z = torch.empty_like(mu)
    if not z.numel():
        return z
    out, tile = z if line_strides(z) else torch.empty_like(z, memory_format=torch.contiguous_format), Tile(parameters[0])
    residual_normal_sample_kernel[(tile.images * tile.steps,)](
        *(*parameters, noise, out, z.shape[1], tile.pixels, tile.steps, temperature),
        *(*line(parameters[0]), *line(noise), *line(out)),
        **tile.constants(*parameters, noise, out),
    )
    return z if out is z else z.copy_(out)
