"""normal_sample and logistic_mixture_sample in Triton's kernels: the same noise gives the sample of the reference."""

from __future__ import annotations

import pytest
import torch
from norms import CL

from nvae_fast import functional as F
from nvae_fast.kernels import _impl, _triton
from nvae_fast.kernels.logistic_mixture import logistic_mixture_channels, ops

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
LAYOUTS = {
    "planar": lambda t: t,
    "channels-last": lambda t: t.contiguous(memory_format=CL),
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
    "half": lambda t: torch.cat((t, t), 1)[:, t.shape[1] :],
}


def draw(*shape, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).bfloat16().float()


def mixture(channels=3, mixtures=2, size=(2, 5, 7), scale=1.0):
    """params, and the two uniforms"""
    g = torch.Generator().manual_seed(1)
    params = draw(size[0], logistic_mixture_channels(channels, mixtures), *size[1:], scale=scale)
    return params, tuple(torch.rand(size[0], c, *size[1:], generator=g) for c in (mixtures, channels))


def pixels(params, noise, impl="triton", channels=3, mixtures=2, **options):
    return F.logistic_mixture_sample(params, channels=channels, num_mixtures=mixtures, noise=noise, impl=impl, **options)


@pytest.mark.parametrize("compat", ["nvlabs", "fixed"])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
@pytest.mark.parametrize(("channels", "mixtures"), [(1, 1), (2, 3), (3, 10), (5, 2)])
def test_pixels_within_budget(within_budget, channels, mixtures, temperature, compat):
    for dtype in (torch.float32, torch.float16):
        params, noise = mixture(channels, mixtures)
        options = dict(channels=channels, mixtures=mixtures, temperature=temperature, compat=compat)
        exact = pixels(params.to(dtype).double(), [u.double() for u in noise], "reference", **options)
        plain = pixels(params.to(dtype), noise, "reference", **options)
        within_budget(pixels(params.to(dtype), noise, **options), plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_in_any_strides(monkeypatch, layout):
    params, noise = mixture()
    dense, arrange = pixels(params, noise), LAYOUTS[layout]
    assert dense.std() > 0.1 and torch.equal(dense, pixels(arrange(params), [arrange(u) for u in noise]))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    assert torch.equal(dense, pixels(arrange(params), noise))


def test_pixels_at_extremes():
    params, noise = mixture(scale=60.0)
    noise[1][0, :, 0, :2] = torch.tensor([0.0, 1.0])
    noise[0][0, :, 1, :2] = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(pixels(params, noise), pixels(params, noise, "reference"))
    for t, (where, nans) in zip((params, *noise), ((0, 3), (0, 3), (1, 2)), strict=True):
        kept = t.clone()
        t[1, where, 2, 3] = torch.nan
        got, plain = pixels(params, noise), pixels(params, noise, "reference")
        if t is noise[1]:  # and what follows from it
            assert got[1, :, 2, 3].isnan().sum() == nans and got.isnan().sum() == nans
        torch.testing.assert_close(got, plain, equal_nan=True)
        t.copy_(kept)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_latents_within_budget(within_budget, dtype, layout):
    arrange = LAYOUTS[layout]
    mu, log_sigma = (arrange(draw(2, 3, 5, 7, seed=i, scale=3.0).to(dtype)) for i in range(2))
    noise = draw(2, 3, 5, 7, seed=2)
    for temperature in (0.0, 0.7, 1.0):
        exact, plain, got = (
            F.normal_sample(mu.to(kind), log_sigma.to(kind), noise, temperature=temperature, impl=impl)
            for kind, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "triton"))
        )
        assert got.stride() == torch.empty_like(mu).stride()
        within_budget(got, plain, exact)


def test_a_sample_is_one_launch(launches):
    params, noise = mixture()
    mu = draw(2, 3, 4, 5)
    with launches() as names:
        pixels(params, noise, temperature=0.7)
        F.normal_sample(mu, mu, mu, temperature=0.7)
    assert names == ["logistic_mixture_sample_kernel", "residual_normal_sample_kernel"]


def test_one_seed_is_one_sample():
    params, _ = mixture()
    found = [pixels(params, None, impl, generator=torch.Generator().manual_seed(3)) for impl in ("triton", "reference")]
    torch.testing.assert_close(*found)


def test_what_needs_a_gradient_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(_triton, "can_run", lambda tensors: None)
    can = _impl.without_gradient(_triton.can_run)
    x = torch.ones(2, requires_grad=True)
    assert can([x.detach()]) is None and can([x]) == "a tensor requires a gradient, which only the reference gives"
    with torch.no_grad():
        assert can([x]) is None
    assert ops.triton_can_sample([x]) == can([x])


def test_empty_and_refused():
    params, noise = mixture(size=(0, 5, 7))
    assert pixels(params, noise).shape == (0, 3, 5, 7) and F.normal_sample(noise[1], noise[1]).shape == (0, 3, 5, 7)
    (params, (u_mixture, u_logistic)), mu = mixture(), draw(2, 3, 4, 5)
    raw = torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="params has 20 channels; expected 30"):
        raw.logistic_mixture_sample_fwd(params, u_mixture, u_logistic, 3, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="u_logistic has shape .* torch.float64; expected float32"):
        raw.logistic_mixture_sample_fwd(params, u_mixture, u_logistic.double(), 2, 1.0, 1.0)
    with pytest.raises(RuntimeError, match="noise has shape"):
        raw.normal_sample_fwd(mu, mu, mu[:1], 1.0)
