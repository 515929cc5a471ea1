"""c5(a) = 5 tanh(a / 5);  Normal(mu, ls): mean c5(mu), sigma = exp(c5(ls)) + 0.01  (Vahdat & Kautz 2020, NVAE).

Everything here takes the raw outputs of the networks, clamps them itself, and accepts any strides. Sums over space are
float32 (float64 for float64 input), whatever the input's dtype and autocast.

`impl="auto"` takes "cpu" for float32 and bfloat16 tensors on the CPU (measured against the reference: README.md beside
this file), "triton" for float32, bfloat16 and float16 tensors on CUDA where Triton is installed, else "reference".
`normal_sample` has "triton" where nothing requires a gradient, else its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nvae_fast.kernels import _check, _impl, _norm, _triton
from nvae_fast.kernels.residual_normal import ops, reference
from nvae_fast.kernels.residual_normal.reference import ResidualNormalOutput

_impl.register("residual_normal", triton=ops.triton_can_run, cpu=ops.cpu_can_run)
_impl.register("normal_sample", triton=ops.triton_can_sample)
_impl.register("normal_log_prob", triton=_triton.can_run, cpu=ops.density_on_cpu)


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
    parameters = _of_type(tensors.values(), dtype)
    impl = _impl.resolve_impl("residual_normal", impl, *parameters, noise)
    if impl == "reference":
        return reference.residual_normal(*parameters, *[None] * (4 - len(parameters)), noise, residual)
    return ResidualNormalOutput(*ops.ResidualNormal.apply(noise, residual, False, None, *parameters))


@_check.typed
def latent_group(
    posterior: Tensor,
    prior: Tensor | None = None,
    noise: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    flow: Callable[[Tensor], Tensor] | None = None,
    residual: bool = True,
    generator: torch.Generator | None = None,
    impl: str = "auto",
) -> ResidualNormalOutput:
    """`residual_normal` of what two networks put out, and of a draw that a flow may move: the latent variables of one group.

        mu_q, log_sigma_q = the halves of posterior + bias;  mu_p, log_sigma_p = those of prior, if one is given
        z, kl, log_q, log_p = residual_normal(mu_q, log_sigma_q, mu_p, log_sigma_p, noise)
        with a flow:  z = flow(z), log_p = normal_log_prob(z, mu_p, log_sigma_p), kl = log_q - log_p

    posterior, prior: [B, 2 Z, h, w], mu first. Their gradients are made in one piece, the prior's in one pass for all that
        reaches it, which `residual_normal` on halves leaves to copies and additions.
    bias: [2 Z] or None, which the network leaves to this op: it reads posterior anyway, and the gradient is the sum of the one
        that it writes.
    flow: keeps the volume, so that log_q holds for what it returns, [B, Z, h, w]. kl is then that of the drawn z alone, not
        its expectation.

    All else, and what raises, as in `residual_normal`.
    """
    tensors = {"posterior": posterior} | ({} if prior is None else {"prior": prior})
    dtype = _check(tensors)
    if posterior.shape[1] % 2:
        raise ValueError(f"posterior has shape {tuple(posterior.shape)}: expected [B, 2 Z, h, w], mu and log sigma")
    if bias is not None:
        if bias.shape != posterior.shape[1:2]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}: expected {tuple(posterior.shape[1:2])}")
        _norm.check_beside(posterior, called="posterior", bias=bias)
        bias = bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
    noise = _noise(posterior[:, posterior.shape[1] // 2 :], noise, generator)
    parameters = _of_type(tensors.values(), dtype)
    chosen = _impl.resolve_impl("residual_normal", impl, *parameters, noise)
    if chosen == "reference":
        halves = [half for t in parameters for half in t.chunk(2, 1)]
        found = *reference.residual_normal(*halves, *[None] * (4 - len(halves)), noise, residual, bias), *parameters[1:]
    else:
        found = ops.ResidualNormal.apply(noise, residual, True, bias, *parameters)
    out = ResidualNormalOutput(*found[:4])
    return out if flow is None else _moved(flow(out.z), out.log_q, found[4:], impl)


def _moved(z: Tensor, log_q: Tensor, prior: Sequence[Tensor], impl: str) -> ResidualNormalOutput:
    """What is to be said of the draw z with log_q that a flow made."""
    impl = _impl.resolve_impl("normal_log_prob", impl, z, *prior)
    if impl == "reference":
        halves = prior[0].chunk(2, 1) if prior else (None, None)
        log_p = reference.normal_log_prob(z, *halves)
        return ResidualNormalOutput(z, log_q - log_p, log_q, log_p)
    dtype = torch.promote_types(z.dtype, prior[0].dtype) if prior else z.dtype
    read = z if z.dtype == dtype else z.to(dtype)
    log_p, kl, passed = ops.NormalLogProb.apply(read, log_q, True, *_of_type(prior, dtype))
    return ResidualNormalOutput(*_norm.shared(z, read, [passed]), kl, log_q, log_p)


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
    mu, log_sigma = _of_type((mu, log_sigma), dtype)
    if _impl.resolve_impl("normal_sample", impl, mu, log_sigma, noise) == "reference":
        return reference.normal_sample(mu, log_sigma, noise, temperature)
    return torch.ops.nvae_fast.normal_sample_fwd(mu, log_sigma, noise, float(temperature))


@_check.typed
def normal_log_prob(z: Tensor, mu: Tensor | None = None, log_sigma: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """log Normal(z; mu, log_sigma), summed over h and w: [B, Z, h, w] each -> [B, Z], in nats. Without mu and log_sigma,
    that of Normal(0, 0), the top group's prior.

    For latents that a flow has moved; `residual_normal` returns the densities of its own draw.
    """
    if (mu is None) != (log_sigma is None):
        missing = "mu" if mu is None else "log_sigma"
        raise ValueError(f"{missing} is missing: give both mu and log_sigma, or neither for the top group's prior")
    tensors = {"z": z} if mu is None or log_sigma is None else {"z": z, "mu": mu, "log_sigma": log_sigma}
    dtype = _check(tensors)
    impl = _impl.resolve_impl("normal_log_prob", impl, *tensors.values())
    if impl == "reference":
        return reference.normal_log_prob(z, mu, log_sigma)
    z, *parameters = _of_type(tensors.values(), dtype)
    return ops.NormalLogProb.apply(z, None, False, *parameters)[0]


@_check.typed
def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5), elementwise, in x's dtype: the identity near 0, bounded by -5 and 5."""
    return reference.soft_clamp(x)


@_check.typed
def normal_params(mu: Tensor, log_sigma: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(mean, sigma) = (c5(mu), temperature * (exp(c5(log_sigma)) + 0.01)), elementwise, in the inputs' dtype."""
    return reference.normal_params(mu, log_sigma, temperature)


def _of_type(tensors: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t if t.dtype == dtype else t.to(dtype) for t in tensors]


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
