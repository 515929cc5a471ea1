"""logistic_mixture_sample on a GPU: a pixel to a lane, which goes through the mixtures and then reads those of its choice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nvae_fast.kernels import _triton
from nvae_fast.kernels._math import log_positive
from nvae_fast.kernels._tile import offset_of
from nvae_fast.kernels.logistic_mixture._device import exp_or_tiny, row_of, tanh_both

BLOCK = 128  # pixels of a program


@triton.jit
def clamped(x, low, high):
    """NaN stays."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def logistic_mixture_sample_kernel(
    params_ptr, u_mixture_ptr, u_logistic_ptr, image_ptr, P, temperature, factor, params_b, params_c, params_p, mixture_b,
    mixture_c, mixture_p, logistic_b, logistic_c, logistic_p, C: tl.constexpr, M: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr
):  # fmt: skip
    blocks = tl.cdiv(P, BLOCK_P)
    b = offset_of(tl.program_id(0) // blocks, WIDE)
    p = offset_of(tl.program_id(0) % blocks, WIDE) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < P
    params = params_ptr + b * params_b + p * params_p
    choice, best = p * 0, tl.full([BLOCK_P], float("-inf"), tl.float32)
    for k in range(M):
        u = tl.load(u_mixture_ptr + b * mixture_b + k * mixture_c + p * mixture_p, mask=inside, other=0.5)
        gumbel = -log_positive(-log_positive(clamped(u, 1e-5, 1.0 - 1e-5)))
        logit = tl.load(params + k * params_c, mask=inside, other=0.0).to(tl.float32)
        score = logit / temperature + (gumbel + 0.0 * u)  # NaN where u is, which the logarithm loses
        taken = (score > best) | ((score != score) & (best == best))  # the first of the largest, or the first NaN
        choice, best = tl.where(taken, k, choice), tl.where(taken, score, best)
    params += choice * params_c
    image = ()
    for c in tl.static_range(C):
        u = tl.load(u_logistic_ptr + b * logistic_b + c * logistic_c + p * logistic_p, mask=inside, other=0.5)
        u = clamped(u, 1e-5, 1.0 - 1e-5)
        mean = tl.load(params + row_of(c, 0, C, M) * params_c, mask=inside, other=0.0).to(tl.float32)
        raw = tl.load(params + row_of(c, 1, C, M) * params_c, mask=inside, other=0.0).to(tl.float32)
        scale = factor * exp_or_tiny(clamped(raw, -7.0, 80.0))
        value = mean + scale * (log_positive(u) - log_positive(1.0 - u) + 0.0 * u)
        for j in tl.static_range(c):
            pair = row_of(c * (c - 1) // 2 + j, 2, C, M) * params_c
            a, _slope = tanh_both(tl.load(params + pair, mask=inside, other=0.0).to(tl.float32))
            value += a * image[j]
        value = clamped(value, -1.0, 1.0)
        tl.store(image_ptr + (b * C + c) * P + p, 0.5 * value + 0.5, mask=inside)
        image = image + (value,)


def logistic_mixture_sample_fwd(params: Tensor, u_mixture: Tensor, u_logistic: Tensor, num_mixtures: int, temperature: float,
                                factor: float) -> Tensor:  # fmt: skip
    c, (b, channels, *size) = u_logistic.shape[1], params.shape
    expected = num_mixtures * (1 + 2 * c + c * (c - 1) // 2)
    if channels != expected:
        raise RuntimeError(f"params has {channels} channels; expected {expected}: {c} colours, {num_mixtures} mixtures")
    for name, u, count in (("u_mixture", u_mixture, num_mixtures), ("u_logistic", u_logistic, c)):
        if u.shape != (b, count, *size) or u.dtype != torch.float32:
            raise RuntimeError(f"{name} has shape {tuple(u.shape)} and type {u.dtype}; expected float32 {(b, count, *size)}")
    image = torch.empty(u_logistic.shape, dtype=torch.float32, device=params.device)
    if image.numel():
        params, u_mixture, u_logistic = given = [_triton.as_lines(t) for t in (params, u_mixture, u_logistic)]
        pixels = size[0] * size[1]
        block = _triton.power_of_2(pixels, BLOCK)
        logistic_mixture_sample_kernel[(b * triton.cdiv(pixels, block),)](
            *(*given, image, pixels, temperature, factor, *(n for t in given for n in _triton.line_strides(t))),
            **{"C": c, "M": num_mixtures, "WIDE": any(map(_triton.wide, (*given, image))), "BLOCK_P": block},
        )
    return image
