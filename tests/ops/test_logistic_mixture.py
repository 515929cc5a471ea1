"""logistic_mixture against the fixtures and a scalar implementation; total mass, gradients, draws, bad arguments."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels.logistic_mixture import (
    logistic_mixture_channels,
    logistic_mixture_log_prob,
    logistic_mixture_mean,
    logistic_mixture_sample,
)

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"
CASES = {"edge_8bit": (2, 8), "edge_5bit": (2, 5), "typical_8bit_M10": (10, 8), "typical_5bit_M10": (10, 5)}


@pytest.fixture(scope="module")
def data():
    return load_file(FIXTURES / "dists_and_schedules.safetensors")


def make(channels, mixtures, bits=8, size=3, batch=2, dtype=torch.float32, seed=0):
    """x on the levels and params whose components lie near the data."""
    g = torch.Generator().manual_seed(seed)
    top = 2**bits - 1
    x = torch.randint(0, top + 1, (batch, channels, size, size), generator=g).to(dtype) / top
    shape = (batch, logistic_mixture_channels(channels, mixtures), size, size)
    return x, torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)


def scalar_pixel(params, channels, m):
    """(log pi, mean, log scale, coefficient) of one pixel as nested lists, by the layout in words."""
    logits, rest = params[:m], params[m:]
    total = math.log(sum(math.exp(v) for v in logits))
    stride = 3 * m if channels == 3 else 2 * m
    mean = [[rest[c * stride + k] for k in range(m)] for c in range(channels)]
    log_scale = [[max(rest[c * stride + m + k], -7.0) for k in range(m)] for c in range(channels)]
    pairs = [(c, j) for c in range(channels) for j in range(c)]
    coefficient = {}
    for slot, pair in enumerate(pairs):
        start = slot * stride + 2 * m if channels == 3 else channels * stride + slot * m
        coefficient[pair] = [math.tanh(rest[start + k]) for k in range(m)]
    return [v - total for v in logits], mean, log_scale, coefficient


def scalar_log_prob(x, params, channels, m, bits):
    """Spec formula for one pixel, one component at a time, in Python floats; the correct upper threshold."""
    top = 2**bits - 1
    log_pi, mean, log_scale, coefficient = scalar_pixel(params, channels, m)
    y = [2 * v - 1 for v in x]
    sigmoid = lambda a: 1 / (1 + math.exp(-a))  # noqa: E731
    total = 0.0
    for k in range(m):
        log_p = log_pi[k]
        for c in range(channels):
            centre = mean[c][k] + sum(coefficient[c, j][k] * y[j] for j in range(c))
            inv = math.exp(-log_scale[c][k])
            upper, lower = sigmoid(inv * (y[c] - centre + 1 / top)), sigmoid(inv * (y[c] - centre - 1 / top))
            level = round(x[c] * top)
            mass = upper if level == 0 else 1 - lower if level == top else upper - lower
            if 0 < level < top and mass <= 1e-5:
                mid = abs(inv * (y[c] - centre))
                log_p += -mid - log_scale[c][k] - 2 * math.log1p(math.exp(-mid)) - math.log(top / 2)
            else:
                log_p += math.log(mass)
        total += math.exp(log_p)
    return math.log(total)


@pytest.mark.parametrize("case", CASES)
def test_fixture(data, case):
    mixtures, bits = CASES[case]
    x, params, expected = (data[f"dmol/{case}/{name}"] for name in ("x", "param", "log_prob"))
    params = params.clone().requires_grad_()
    # The published numbers round as the reference does; those of the native code are nearer to the float64 ones.
    log_prob = logistic_mixture_log_prob(x, params, num_mixtures=mixtures, num_bits=bits, impl="reference")
    assert log_prob.dtype == torch.float32 and log_prob.shape == expected.shape
    torch.testing.assert_close(log_prob, expected, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(log_prob.sum(), params)
    torch.testing.assert_close(grad, data[f"dmol/{case}/grad_of_sum_wrt_param"], rtol=1e-4, atol=1e-5)
    exact = logistic_mixture_log_prob(x.double(), params.double(), num_mixtures=mixtures, num_bits=bits)
    torch.testing.assert_close(exact, data[f"dmol/{case}/log_prob_f64"], rtol=1e-12, atol=1e-12)
    mean = logistic_mixture_mean(params, channels=3, num_mixtures=mixtures)
    torch.testing.assert_close(mean, data[f"dmol/{case}/mixture_mean_image"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 5])
def test_fixture_of_total_mass(data, bits):
    case = f"dmol/mass_{bits}bit"
    x, params = data[f"{case}/x"].double(), data[f"{case}/param"].double()
    nvlabs, fixed = (
        logistic_mixture_log_prob(x, params, num_mixtures=1, num_bits=bits, compat=compat) for compat in ("nvlabs", "fixed")
    )
    torch.testing.assert_close(nvlabs, data[f"{case}/log_prob_f64"], rtol=1e-12, atol=1e-12)
    expected = json.loads((FIXTURES / "dists_and_schedules.json").read_text())[case]
    assert nvlabs.exp().sum().item() == pytest.approx(expected["sum_exp_logprob_over_levels_of_channel0"], abs=1e-5)
    assert fixed.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(nvlabs, fixed) == (bits == 5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_fixed_mass_is_one_at_every_depth(bits):
    levels = 2**bits
    x = (torch.arange(levels) / (levels - 1)).view(-1, 1, 1, 1)
    # A component near the upper edge, where a wrong threshold shows, and a broad one.
    params = torch.tensor([0.3, -0.2, 0.97, 0.1, -2.0, -0.5]).view(1, -1, 1, 1).expand(levels, -1, -1, -1)
    log_prob = logistic_mixture_log_prob(x, params, num_mixtures=2, num_bits=bits, compat="fixed")
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_joint_mass_is_one(channels):
    x = torch.tensor(list(itertools.product(range(4), repeat=channels))).view(-1, channels, 1, 1) / 3
    params = make(channels, 2, size=1, batch=1)[1].expand(len(x), -1, -1, -1)
    log_prob = logistic_mixture_log_prob(x, params, num_mixtures=2, num_bits=2, compat="fixed")
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_scalar_implementation_and_layout(channels):
    m, bits = 3, 5
    x, params = make(channels, m, bits, dtype=torch.float64)
    log_prob = logistic_mixture_log_prob(x, params, num_mixtures=m, num_bits=bits)
    mean = logistic_mixture_mean(params, channels=channels, num_mixtures=m)
    for b, i, j in itertools.product(range(2), range(3), range(3)):
        pixel = params[b, :, i, j].tolist()
        expected = scalar_log_prob(x[b, :, i, j].tolist(), pixel, channels, m, bits)
        assert log_prob[b, i, j].item() == pytest.approx(expected, abs=1e-9)
        log_pi, means, _, coefficients = scalar_pixel(pixel, channels, m)
        y = []
        for c in range(channels):
            average = lambda values: sum(math.exp(w) * v for w, v in zip(log_pi, values, strict=True))  # noqa: B023, E731
            value = average(means[c]) + sum(average(coefficients[c, e]) * y[e] for e in range(c))
            y.append(min(max(value, -1.0), 1.0))
        assert mean[b, :, i, j].tolist() == pytest.approx([v / 2 + 0.5 for v in y], abs=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_gradients_of_first_and_second_order(channels):
    _, params = make(channels, 2, size=2, batch=1, dtype=torch.float64)
    x = torch.tensor([0, 3, 7, 4], dtype=torch.float64).view(1, 1, 2, 2).expand(1, channels, 2, 2) / 7
    params.requires_grad_()

    def log_prob(p):
        return logistic_mixture_log_prob(x, p, num_mixtures=2, num_bits=3)

    def mean(p):
        return logistic_mixture_mean(p, channels=channels, num_mixtures=2)

    noise = (torch.full((1, 2, 2, 2), 0.4).double(), torch.full((1, channels, 2, 2), 0.6).double())

    def sample(p):
        return logistic_mixture_sample(p, channels=channels, num_mixtures=2, noise=noise)

    for f in (log_prob, mean, sample):
        assert gradcheck(f, (params,))
    assert gradgradcheck(log_prob, (params,))


@pytest.mark.parametrize("value", [-1e4, -40.0, 40.0, 1e4])
def test_gradients_are_finite_at_extremes(value):
    x, params = make(3, 2, batch=1, size=4)
    for channels in (slice(2, 4), slice(4, 6), slice(6, 8), slice(0, 1)):  # means, log-scales, coefficients, a logit
        extreme = params.clone()
        extreme[:, channels] = value
        extreme.requires_grad_()
        log_prob = logistic_mixture_log_prob(x, extreme, num_mixtures=2)
        (grad,) = torch.autograd.grad(log_prob.sum(), extreme)
        assert log_prob.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fixture_of_samples(data, temperature):
    params, expected = data["dmol/sample/param"], data[f"dmol/sample/image_t{temperature}"]
    noise = tuple(data[f"dmol/sample/{name}_t{temperature}"] for name in ("u_mix", "u_logistic"))
    image = logistic_mixture_sample(params, channels=3, num_mixtures=3, temperature=temperature, noise=noise)
    torch.testing.assert_close(image, expected, rtol=1e-6, atol=1e-6)
    fixed = logistic_mixture_sample(params, channels=3, num_mixtures=3, temperature=temperature, noise=noise, compat="fixed")
    assert torch.equal(fixed, image) == (temperature == 1.0)


@pytest.mark.parametrize(("compat", "wider"), [("fixed", False), ("nvlabs", True)])
def test_temperature_and_compat_of_samples(compat, wider):
    params = torch.tensor([0.0, 0.1, -3.0]).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    draw = [
        logistic_mixture_sample(
            params,
            channels=1,
            num_mixtures=1,
            temperature=t,
            compat=compat,
            generator=torch.Generator().manual_seed(5),
        )
        for t in (1.0, 0.5)
    ]
    # The deviation of a logistic of scale s is s pi / sqrt 3; images are in [0, 1], so half of it.
    assert draw[0].std().item() == pytest.approx(math.exp(-3) * math.pi / math.sqrt(3) / 2, rel=0.1)
    ratio = (draw[1] - 0.55).abs().mean() / (draw[0] - 0.55).abs().mean()
    assert ratio.item() == pytest.approx(2.0 if wider else 0.5, rel=1e-3)


def test_samples_follow_the_density():
    params = torch.tensor([0.5, -0.5, -0.6, 0.5, -2.0, -1.5]).view(1, 6, 1, 1)
    generator = torch.Generator().manual_seed(6)
    many = params.expand(1, 6, 200, 200)
    image = logistic_mixture_sample(many, channels=1, num_mixtures=2, generator=generator)
    frequency = torch.histc((image * 7).round(), bins=8, min=0, max=7) / image.numel()
    levels = (torch.arange(8) / 7).view(-1, 1, 1, 1)
    # Rounding to the nearest level is the discretisation of the density.
    log_prob = logistic_mixture_log_prob(levels, params.expand(8, -1, -1, -1), num_mixtures=2, num_bits=3, compat="fixed")
    torch.testing.assert_close(frequency, log_prob.exp().flatten(), rtol=0, atol=0.01)


def test_generator_repeats_and_noise_is_clamped():
    params = make(3, 4)[1]
    draws = [
        logistic_mixture_sample(params, channels=3, num_mixtures=4, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert all(0 <= d.min() and d.max() <= 1 for d in draws)
    edges = (torch.zeros(2, 4, 3, 3), torch.ones(2, 3, 3, 3))
    assert logistic_mixture_sample(params, channels=3, num_mixtures=4, noise=edges).isfinite().all()


def test_strided_inputs_and_gradients():
    x, params = make(3, 2, dtype=torch.float64)
    dense = params.clone().requires_grad_()
    strided = params.to(memory_format=torch.channels_last).requires_grad_()
    expected = logistic_mixture_log_prob(x, dense, num_mixtures=2)
    out = logistic_mixture_log_prob(torch.stack([x, x], -1)[..., 0], strided, num_mixtures=2)
    torch.testing.assert_close(out, expected)
    for dy in (torch.ones(1).double().expand(2, 3, 3), torch.arange(18.0).double().view(3, 3, 2).permute(2, 0, 1)):
        grads = [torch.autograd.grad(y, p, dy, retain_graph=True)[0] for y, p in ((out, strided), (expected, dense))]
        torch.testing.assert_close(*grads)


def test_low_precision_params_are_computed_in_float32():
    x, params = make(3, 2, dtype=torch.float32)
    low = params.bfloat16()
    expected = logistic_mixture_log_prob(x, low.float(), num_mixtures=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_prob = logistic_mixture_log_prob(x, low, num_mixtures=2)
        mean = logistic_mixture_mean(low, channels=3, num_mixtures=2)
    assert log_prob.dtype == mean.dtype == torch.float32
    assert torch.equal(log_prob, expected)
    exact = logistic_mixture_log_prob(x.double(), low.double(), num_mixtures=2)
    # No plain op in bfloat16 to compare with: float32's own rounding, on a sum of 3 M terms of this size.
    assert (log_prob.double() - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_channels():
    assert [logistic_mixture_channels(c, 10) for c in (1, 2, 3, 4)] == [30, 60, 100, 150]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (logistic_mixture_log_prob, {"x": torch.zeros(2, 3)}, r"x of shape \(2, 3\)"),
        (logistic_mixture_log_prob, {"x": torch.zeros(2, 1, 3, 3)}, r"expected a floating-point \[B, 6, H, W\]"),
        (logistic_mixture_log_prob, {"x": torch.zeros(2, 3, 3, 4)}, "expected the batch and size of params"),
        (logistic_mixture_log_prob, {"num_bits": 9}, "num_bits 9: expected 1 to 8"),
        (logistic_mixture_log_prob, {"compat": "new"}, "compat 'new': expected one of nvlabs, fixed"),
        (logistic_mixture_sample, {"channels": 3, "temperature": 0.0}, "temperature 0.0: expected a positive"),
        (logistic_mixture_sample, {"channels": 3, "noise": (torch.zeros(2), torch.zeros(2))}, "noise of shapes"),
        (logistic_mixture_mean, {"channels": 0}, "channels 0, num_mixtures 2: expected at least one"),
        (logistic_mixture_mean, {"channels": 2}, r"params of shape \(2, 20, 3, 3\)"),
    ],
)
def test_bad_arguments(function, arguments, message):
    x, params = make(3, 2)
    base = {"params": params, "num_mixtures": 2} | ({"x": x} if function is logistic_mixture_log_prob else {})
    with pytest.raises(ValueError, match=message) as caught:
        function(**(base | arguments))
    assert "\n" not in str(caught.value)
