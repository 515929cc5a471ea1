"""c5(a) = 5 tanh(a / 5);  Normal(mu, ls): mean c5(mu), sigma = exp(c5(ls)) + 0.01  (Vahdat & Kautz 2020, NVAE).

Everything here takes the raw outputs of the networks, clamps them itself, and accepts any strides. Sums over space are
float32 (float64 for float64 input), whatever the input's dtype and autocast.

`impl="auto"` takes "cpu" for float32 and bfloat16 tensors on the CPU (measured against the reference: README.md beside
this file), "triton" for float32, bfloat16 and float16 tensors on CUDA where Triton is installed, else "reference".
`normal_sample` and `normal_log_prob` have their reference only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nvae_fast.kernels import _check, _impl
from nvae_fast.kernels.residual_normal import ops, reference
from nvae_fast.kernels.residual_normal.reference import ResidualNormalOutput

_impl.register("residual_normal", triton=ops.triton_can_run, cpu=ops.cpu_can_run)
_impl.register("normal_sample")
_impl.register("normal_log_prob")


@_check.typed
def residual_normal(
    mu_q: Tensor,
    log_sigma_q: Tensor,
    mu_p: Tensor | None = None,
    log_sigma_p: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    residual: bool = True,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> ResidualNormalOutput:
    """A draw from the posterior of one latent group, its KL from the prior, and its density under both.

        p = Normal(mu_p, log_sigma_p), or Normal(0, 0) (mean 0, sigma 1.01) when no prior is given
        q = Normal(mu_p + mu_q, log_sigma_p + log_sigma_q)     with a prior and residual=True: raw sums, then the clamp
        q = Normal(mu_q, log_sigma_q)                          otherwise
        z = mean_q + sigma_q * noise
        kl, log_q, log_p = sums over h, w of KL(q || p), log q(z), log p(z)

    All tensors [B, Z, h, w]; z has that shape and the promoted dtype of the parameters, the sums [B, Z] are in nats.
    The densities are those of z before it is rounded to a low precision.

    noise: standard normal, [B, Z, h, w]; drawn with `generator` when None, in float32 also for low precisions, so that
        one seed means one sample. It is data: no gradient flows into it, except through the reference.
    impl: "auto", "reference", "cpu" (float32, bfloat16) or "triton" (CUDA; float16 too). The reference alone can be
        differentiated twice.

    Raises ValueError or TypeError for tensors that do not fit together, RuntimeError for an `impl` that cannot run.
    """
    tensors = {"mu_q": mu_q, "log_sigma_q": log_sigma_q}
    if (mu_p is None) != (log_sigma_p is None):
        missing = "mu_p" if mu_p is None else "log_sigma_p"
        raise ValueError(f"{missing} is missing: give both mu_p and log_sigma_p, or neither for the top group's prior")
    if mu_p is not None and log_sigma_p is not None:
        tensors |= {"mu_p": mu_p, "log_sigma_p": log_sigma_p}
    dtype = _check(tensors)
    noise = _noise(mu_q, noise, generator)
    mu_q, log_sigma_q, *prior = (t if t.dtype == dtype else t.to(dtype) for t in tensors.values())
    mu_p, log_sigma_p = prior or (None, None)
    impl = _impl.resolve_impl("residual_normal", impl, mu_q, log_sigma_q, mu_p, log_sigma_p, noise)
    if impl == "reference":
        return reference.residual_normal(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, residual)
    return ResidualNormalOutput(*ops.ResidualNormal.apply(mu_q, log_sigma_q, mu_p, log_sigma_p, noise, residual))


@_check.typed
def normal_sample(
    mu: Tensor,
    log_sigma: Tensor,
    noise: Tensor | None = None,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> Tensor:
    """z = c5(mu) + temperature * (exp(c5(log_sigma)) + 0.01) * noise, all [B, Z, h, w]: a draw from the prior.

    noise: as in `residual_normal`. temperature: a factor >= 0 of the standard deviation, without unit.
    """
    if not temperature >= 0.0:
        raise ValueError(f"temperature is {temperature}: expected a number >= 0 (1 samples the model itself)")
    dtype = _check({"mu": mu, "log_sigma": log_sigma})
    noise = _noise(mu, noise, generator)
    _impl.resolve_impl("normal_sample", impl, mu, log_sigma, noise)
    return reference.normal_sample(mu.to(dtype), log_sigma.to(dtype), noise, temperature)


@_check.typed
def normal_log_prob(z: Tensor, mu: Tensor, log_sigma: Tensor, *, impl: str = "auto") -> Tensor:
    """log Normal(z; mu, log_sigma), summed over h and w: [B, Z, h, w] each -> [B, Z], in nats.

    For latents that a flow has moved; `residual_normal` returns the densities of its own draw.
    """
    _check({"z": z, "mu": mu, "log_sigma": log_sigma})
    _impl.resolve_impl("normal_log_prob", impl, z, mu, log_sigma)
    return reference.normal_log_prob(z, mu, log_sigma)


@_check.typed
def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5), elementwise, in x's dtype: the identity near 0, bounded by -5 and 5."""
    return reference.soft_clamp(x)


@_check.typed
def normal_params(mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(mean, sigma) = (c5(mu), temperature * (exp(c5(log_sigma)) + 0.01)), elementwise, in the inputs' dtype."""
    return reference.normal_params(mu, log_sigma, temperature)


def _check(tensors: dict[str, Tensor]) -> torch.dtype:
    """Same 4-D shape and device, floating point; returns the promoted dtype."""
    (first, model), *others = tensors.items()
    shape, dtype, device = model.shape, model.dtype, model.device
    if len(shape) != 4:
        raise ValueError(f"{first} has shape {tuple(shape)}: expected [B, Z, h, w]")
    if not dtype.is_floating_point:
        raise TypeError(f"{first} is {dtype}: expected a floating-point tensor")
    for name, t in others:
        if t.dtype != dtype:
            if not t.is_floating_point():
                raise TypeError(f"{name} is {t.dtype}: expected a floating-point tensor")
            dtype = torch.promote_types(dtype, t.dtype)
        if t.shape != shape or t.device != device:
            raise _unlike(name, t, first, model)
    return dtype


def _unlike(name: str, t: Tensor, first: str, model: Tensor) -> ValueError:
    if t.shape != model.shape:
        return ValueError(f"{name} has shape {tuple(t.shape)}: expected that of {first}, {tuple(model.shape)}")
    return ValueError(f"{name} is on {t.device} and {first} on {model.device}: move them to one device")


def _noise(model: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    wide = torch.float64 if model.dtype == torch.float64 else torch.float32
    if noise is None:
        return torch.randn(model.shape, generator=generator, device=model.device, dtype=wide)
    if noise.shape != model.shape or noise.device != model.device:
        raise _unlike("noise", noise, "the parameters", model)
    return noise if noise.dtype == wide else noise.to(wide)
