"""logistic_mixture's Triton kernels: values and gradients against float64, at extremes, any strides, the C++ op."""

from __future__ import annotations

import pytest
import torch
from norms import CL, needs_native

from nvae_fast import functional as F
from nvae_fast.kernels import _triton
from nvae_fast.kernels.logistic_mixture import logistic_mixture_channels

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16


def make(channels=3, mixtures=2, bits=8, size=(2, 5, 7), scale=1.0, seed=0):
    """x on the levels, and params that every storage type holds exactly."""
    g = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    x = torch.randint(0, top + 1, (size[0], channels, *size[1:]), generator=g)
    x[:, :, :1, :3] = torch.tensor([0, top, top - 1])[: size[2]]  # both edges and the level below the top
    params = scale * torch.randn(size[0], logistic_mixture_channels(channels, mixtures), *size[1:], generator=g)
    return x.float() / top, params.bfloat16().float()


def run(x, params, impl="triton", mixtures=2, bits=8, compat="nvlabs", grad=None):
    """(log p, gradient of params)"""
    params = params.detach().requires_grad_()
    out = F.logistic_mixture_log_prob(x, params, num_mixtures=mixtures, num_bits=bits, compat=compat, impl=impl)
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return out.detach(), torch.autograd.grad(out, params, grad.to(out.dtype))[0]


def agrees(within_budget, x, params, dtype=FLOAT, **settings):
    exact = run(x.double(), params.double(), "reference", **settings)
    got, plain = (run(x, params.to(dtype), impl, **settings) for impl in ("triton", "reference"))
    for triple in zip(got, plain, exact, strict=True):
        within_budget(*triple)


def same(found, others):
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in zip(found, others, strict=True))


@pytest.mark.parametrize("compat", ["nvlabs", "fixed"])
@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize(("channels", "mixtures"), [(1, 1), (2, 3), (3, 10), (5, 2)])
def test_values_and_gradients(within_budget, channels, mixtures, bits, compat):
    x, params = make(channels, mixtures, bits)
    agrees(within_budget, x, params, mixtures=mixtures, bits=bits, compat=compat)


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BFLOAT])
@pytest.mark.parametrize("scale", [0.01, 4.0])
def test_types_and_scales(within_budget, scale, dtype):
    agrees(within_budget, *make(scale=scale), dtype)


def test_many_mixtures_and_many_programs(within_budget):
    for bits, mixtures, size in ((2, 30, (1, 3, 13)), (3, 57, (1, 1, 3)), (6, 1, (1, 23, 24)), (7, 4, (2, 9, 16))):
        x, params = make(3, mixtures, bits, size)
        agrees(within_budget, x, params, mixtures=mixtures, bits=bits)


# name: (rows of the params of 3 channels and 2 mixtures, value); colour c begins at 2 + 6 c with 2 means, 2 log-scales.
EXTREMES = {
    "log-scales at the clamp": (slice(4, 6), -7.0),
    "log-scales far below the clamp": (slice(4, 6), -1e4),
    "log-scales of 30": (slice(4, 6), 30.0),
    "log-scales beyond exp's range": (slice(4, 6), 1e3),
    "means above": (slice(2, 4), 40.0),
    "means below": (slice(8, 10), -40.0),
    "means far outside": (slice(2, 4), 1e4),
    "saturated coefficients": (slice(6, 8), -40.0),
    "a dominant logit": (slice(0, 1), 90.0),
    "one logit far below": (slice(1, 2), -1e4),
}


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(within_budget, extreme, bits):
    rows, value = EXTREMES[extreme]
    x, params = make(bits=bits, size=(1, 9, 8))
    params[:, rows] = value
    agrees(within_budget, x, params, bits=bits, compat="fixed")


def test_narrow_components_in_the_middle_of_their_bins(within_budget):
    x, params = make(1, 1, 8, (1, 8, 16))
    params[:, 1:2] = 2 * x - 1 + 0.3 * params[:, :1] / 255
    for log_scale in (-7.0, -5.0, -1.0):
        params[:, 2] = log_scale
        agrees(within_budget, x, params, mixtures=1, compat="fixed")


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=CL),
    "half of the channels, channels-last": lambda t: torch.cat([t, t], 1).contiguous(memory_format=CL).chunk(2, 1)[0],
    "window of a larger map": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_back(layout):
    arrange = LAYOUTS[layout]
    x, params = (arrange(t) for t in make(mixtures=3, size=(2, 6, 5)))
    grad = arrange(torch.randn(2, 1, 6, 5).expand(-1, 3, -1, -1))[:, 1]  # cut from a tensor with a channel before the pixels
    dense = run(x.contiguous(), params.contiguous(), mixtures=3, grad=grad.contiguous())
    found = run(x, params, mixtures=3, grad=grad)
    assert same(dense, found) and found[1].stride() == torch.empty_like(params).stride()


def test_offsets_of_64_bits_and_reruns_give_the_same_bits(monkeypatch):
    x, params = make(mixtures=3)
    narrow = run(x, params, mixtures=3)
    assert same(narrow, run(x, params, mixtures=3))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    assert same(narrow, run(x, params, mixtures=3))


@needs_native
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_as_the_native_code(monkeypatch, channels):
    x, params = make(channels, 10)
    ours = run(x, params, mixtures=10)
    monkeypatch.undo()
    for a, b in zip(ours, run(x, params, "cpu", mixtures=10), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-5)


def test_the_clamp_has_a_gradient_at_equality_and_none_below():
    x, params = make()
    for value, live in ((-7.0, True), (-7.5, False)):
        params[:, 4:6] = value
        assert run(x, params)[1][:, 4:6].ne(0).any() == live


def test_log_probabilities_near_0_keep_their_digits():
    """sigmoid(14.8) rounds to 1."""
    for x, mean in ((1.0, 3.0), (0.0, -3.0)):
        x, params = torch.full((1, 1, 1, 1), x), torch.tensor([0.0, mean, -2.0]).view(1, 3, 1, 1)
        exact = run(x.double(), params.double(), "reference", mixtures=1)[0]
        torch.testing.assert_close(run(x, params, mixtures=1)[0].double(), exact, rtol=1e-5, atol=0)


def test_level_254_is_the_top_for_nvlabs_alone():
    x, params = torch.full((1, 1, 1, 1), 254 / 255), torch.tensor([0.0, 0.9, -2.0]).view(1, 3, 1, 1)
    for compat in ("nvlabs", "fixed"):
        assert (run(x, params, mixtures=1, compat=compat)[0].exp() > 0.1) == (compat == "nvlabs")


def test_nan_stays_in_its_pixel():
    for channel in (0, 3, 4, 6, None):
        x, params = make(size=(1, 4, 6))
        (x[0, 1] if channel is None else params[0, channel])[2, 3] = torch.nan
        out, grad = run(x, params)
        assert out[0, 2, 3].isnan() and out.isnan().sum() == 1 and grad.isnan().any((0, 1)).sum() == 1


def test_a_component_of_probability_zero():
    x, params = make()
    params[:, 0] = -torch.inf
    for a, b in zip(run(x, params), run(x, params, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(size):
    out, grad = run(torch.zeros(size[0], 3, *size[1:]), torch.zeros(size[0], 20, *size[1:]))
    assert out.shape == size and grad.shape == (size[0], 20, *size[1:])


BAD = {
    "20 channels; expected 30: 3 colours, 3 mixtures": lambda x, p: (x, p, 3, 8, True),
    "x has shape .* beside params": lambda x, p: (x[:, :, :1], p, 2, 8, True),
    "torch.float64; expected float32": lambda x, p: (x.double(), p, 2, 8, True),
    "num_bits is 9; expected 1 to 8": lambda x, p: (x, p, 2, 9, True),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message):
    x, params = make()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nvae_fast.logistic_mixture_log_prob_fwd(*BAD[message](x, params))
    with pytest.raises(RuntimeError, match="the gradient has shape"):
        torch.ops.nvae_fast.logistic_mixture_log_prob_bwd(torch.zeros(2, 5, 6), x, params, 2, 8, True)
