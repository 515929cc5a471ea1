"""The discretised mixture of logistics: log-probability, draw and mean of an image.

`params` [B, M (1 + 2C + C(C-1)/2), H, W] hold M mixture logits first. For C = 3 the other 9M channels are viewed as
(3 colours, 3M): M means, M log-scales and M coefficients per colour (NVAE's layout, coefficient slots 0, 1, 2 standing
for (G, R), (B, R), (B, G)). For any other C they are (C, 2M) means and log-scales, then M coefficients for each pair
(channel, earlier channel) = (1, 0), (2, 0), (2, 1), (3, 0), ... Log-scales are clamped below at -7, coefficients go
through tanh. Images are in [0, 1]; the formulas are in y = 2x - 1.

`impl="auto"` of `logistic_mixture_log_prob` takes "cpu" on the CPU for float32 and bfloat16 params and an x that needs no
gradient (measured against the reference: README.md beside this file), "triton" on CUDA where Triton is installed (float16 too),
else "reference". The other two have their reference only: they run once per image drawn, not in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.kernels import _check, _impl
from nvae_fast.kernels.logistic_mixture import ops, reference

COMPAT = ("nvlabs", "fixed")

_impl.register("logistic_mixture_log_prob", triton=ops.triton_can_run, cpu=ops.cpu_can_run)
_impl.register("logistic_mixture_sample", triton=ops.triton_can_sample)
_impl.register("logistic_mixture_mean")


@_check.typed
def logistic_mixture_log_prob(
    x: Tensor,
    params: Tensor,
    *,
    num_mixtures: int,
    num_bits: int = 8,
    compat: str = "nvlabs",
    impl: str = "auto",
) -> Tensor:
    """log p(x) = log sum_k pi_k prod_c P_ck(y_c), [B, H, W], with y = 2x - 1 and K = 2^num_bits - 1.

    Per component, d = y_c - mean_c - sum over j < c of a_cj y_j, and s = exp(log-scale):

        P = F((d + 1/K)/s) - F((d - 1/K)/s), F = sigmoid;  F((d + 1/K)/s) at the bottom level;
        1 - F((d - 1/K)/s) at the top;  where P <= 1e-5 inside: density * 2/K

    Args:
        x: [B, C, H, W] in [0, 1], at multiples of 1/K, any strides.
        params: see the module.
        num_mixtures: M.
        num_bits: bits per channel, 1 to 8.
        compat: "nvlabs" takes y > 0.99 for the top, which with 8 bits makes level 254 open-ended too (published
            numbers: a pixel's probabilities sum to more than 1); "fixed" the top level alone.
        impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too). The reference alone gives a
            gradient of x and can be differentiated twice.

    Returns:
        float32 (float64 for float64 params).

    Raises:
        ValueError: shapes or devices that do not match, num_bits outside 1 to 8, an unknown compat.
        RuntimeError: an `impl` that cannot run.

    Source: Salimans et al., PixelCNN++, arXiv 1701.05517.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x of shape {tuple(x.shape)} and {x.dtype}: expected a floating-point [B, C, H, W] in [0, 1]")
    _check_params(params, x.shape[1], num_mixtures)
    if (x.shape[0], *x.shape[2:]) != (params.shape[0], *params.shape[2:]):
        raise ValueError(f"x of shape {tuple(x.shape)}: expected the batch and size of params, {tuple(params.shape)}")
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits {num_bits}: expected 1 to 8 bits per channel")
    _check_compat(compat)
    if x.device != params.device:
        raise ValueError(f"x is on {x.device} and params on {params.device}: move them to one device")
    x = x.to(torch.promote_types(params.dtype, torch.float32))
    if _impl.resolve_impl("logistic_mixture_log_prob", impl, x, params) != "reference":
        return ops.LogisticMixtureLogProb.apply(x, params, num_mixtures, num_bits, compat == "fixed")
    return reference.logistic_mixture_log_prob(x, params, num_mixtures=num_mixtures, num_bits=num_bits, compat=compat)


@_check.typed
def logistic_mixture_sample(
    params: Tensor,
    *,
    channels: int,
    num_mixtures: int,
    temperature: float = 1.0,
    noise: tuple[Tensor, Tensor] | None = None,
    compat: str = "nvlabs",
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """A draw [B, C, H, W] in [0, 1], not rounded to levels.

    The component of a pixel is argmax_k(logit_k / t - log(-log u_k)), shared by the channels. Then, in [-1, 1],
    y_c = clamp(mean_c + s_c r (log u_c - log(1 - u_c)) + sum over j < c of a_cj y_j), r the temperature's factor.

    Args:
        params, channels, num_mixtures: see the module.
        temperature: t, positive. compat "fixed": r = t. "nvlabs": r = 1 / t, as the reference has it, so that less
            temperature means more noise in the pixels.
        noise: uniforms (u_mixture [B, M, H, W], u_logistic [B, C, H, W]), clamped to [1e-5, 1 - 1e-5]; drawn in this
            order from `generator` when None.

    Raises:
        ValueError: shapes that do not match, a temperature that is not positive, an unknown compat.
    """
    _check_params(params, channels, num_mixtures)
    _check_compat(compat)
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: expected a positive number; logistic_mixture_mean has no noise")
    batch, _, height, width = params.shape
    shapes = (batch, num_mixtures, height, width), (batch, channels, height, width)
    if noise is None:
        # Drawn here, so that every implementation turns one seed into the same image.
        dtype = torch.promote_types(params.dtype, torch.float32)
        noise = tuple(torch.rand(s, dtype=dtype, device=params.device, generator=generator) for s in shapes)
    given = tuple(tuple(u.shape) for u in noise)
    if given != shapes:
        raise ValueError(f"noise of shapes {given}: expected (u_mixture, u_logistic) of shapes {shapes}")
    if _impl.resolve_impl("logistic_mixture_sample", impl, params, *noise) != "reference":
        factor = temperature if compat == "fixed" else 1.0 / temperature
        u_mixture, u_logistic = (u.float() for u in noise)
        return torch.ops.nvae_fast.logistic_mixture_sample_fwd(
            params, u_mixture, u_logistic, num_mixtures, float(temperature), factor
        )
    return reference.logistic_mixture_sample(params, *noise, num_mixtures=num_mixtures, temperature=temperature, compat=compat)


@_check.typed
def logistic_mixture_mean(params: Tensor, *, channels: int, num_mixtures: int, impl: str = "auto") -> Tensor:
    """Image [B, C, H, W] in [0, 1]: y_c = clamp(mean_c + sum over j < c of a_cj y_j), where the means and the
    coefficients are averages over the components with weights softmax(logits)."""
    _check_params(params, channels, num_mixtures)
    _impl.resolve_impl("logistic_mixture_mean", impl, params)
    return reference.logistic_mixture_mean(params, channels=channels, num_mixtures=num_mixtures)


@_check.typed
def logistic_mixture_channels(channels: int, num_mixtures: int) -> int:
    """Channels of `params`: M (1 + 2C + C(C-1)/2), 10 M for three colours."""
    if channels < 1 or num_mixtures < 1:
        raise ValueError(f"channels {channels}, num_mixtures {num_mixtures}: expected at least one of each")
    return num_mixtures * (1 + 2 * channels + channels * (channels - 1) // 2)


def _check_params(params: Tensor, channels: int, num_mixtures: int) -> None:
    expected = logistic_mixture_channels(channels, num_mixtures)
    if params.dim() != 4 or params.shape[1] != expected or not params.is_floating_point():
        raise ValueError(
            f"params of shape {tuple(params.shape)} and {params.dtype}: expected a floating-point "
            f"[B, {expected}, H, W] for {channels} channels and {num_mixtures} mixtures"
        )


def _check_compat(compat: str) -> None:
    if compat not in COMPAT:
        raise ValueError(f"compat {compat!r}: expected one of {', '.join(COMPAT)}")
