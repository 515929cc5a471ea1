"""The decoder's distributions against the fixtures, their draws and means, bit reduction, bad arguments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nvae_fast.distributions import (
    Bernoulli,
    LogisticMixture,
    NormalDecoder,
    decoder_distribution,
    output_channels,
    reduce_bits,
)
from nvae_fast.errors import InputError
from nvae_fast.kernels import use_impl

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"


@pytest.fixture(scope="module")
def data():
    return load_file(FIXTURES / "dists_and_schedules.safetensors")


def test_bernoulli_fixture(data):
    dist = Bernoulli(data["bernoulli/logits"])
    log_prob = dist.log_prob(data["bernoulli/x"])
    torch.testing.assert_close(log_prob, data["bernoulli/log_prob"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(-log_prob.sum((1, 2, 3)), data["bernoulli/recon_nocrop"], rtol=1e-6, atol=1e-3)
    crop = -log_prob[:, :, 2:30, 2:30].sum((1, 2, 3))
    torch.testing.assert_close(crop, data["bernoulli/recon_crop"], rtol=1e-6, atol=1e-3)
    assert torch.equal(dist.mean, torch.sigmoid(data["bernoulli/logits"]))


def test_bernoulli_samples():
    logits = torch.tensor([-1.0, 0.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 100, 100)
    dist = Bernoulli(logits)
    for temperature in (1.0, 0.5):
        image = dist.sample(temperature, generator=torch.Generator().manual_seed(0))
        assert set(image.unique().tolist()) == {0.0, 1.0}
        expected = torch.sigmoid(torch.tensor([-1.0, 0.0, 2.0]) / temperature)
        torch.testing.assert_close(image.mean((0, 2, 3)), expected, rtol=0, atol=0.02)
    noise = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(1, 3, 100, 100)
    assert dist.sample(noise=noise)[0, :, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_normal_decoder_fixture(data):
    dist = NormalDecoder(data["normal_decoder/param"], 3)
    log_prob = dist.log_prob(data["normal_decoder/x"])
    torch.testing.assert_close(log_prob, data["normal_decoder/log_prob"], rtol=1e-6, atol=1e-6)
    image = dist.sample(noise=data["normal_decoder/sample_noise"])
    torch.testing.assert_close(image, data["normal_decoder/sample"], rtol=1e-6, atol=1e-6)
    raw = data["normal_decoder/param"][:, :3]
    expected = (5 * torch.tanh(raw / 5)).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(dist.mean, expected, rtol=1e-6, atol=1e-6)


def test_normal_decoder_temperature(data):
    params, noise = data["normal_decoder/param"], data["normal_decoder/sample_noise"]
    published, fixed = (NormalDecoder(params, 3, compat) for compat in ("nvlabs", "fixed"))
    assert torch.equal(published.sample(0.3, noise=noise), published.sample(noise=noise))
    assert torch.equal(fixed.sample(1.0, noise=noise), published.sample(noise=noise))
    expected = (fixed.mu + 0.3 * fixed.sigma * noise).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(fixed.sample(0.3, noise=noise), expected)
    assert not torch.equal(fixed.sample(0.3, noise=noise), fixed.sample(noise=noise))


def test_normal_decoder_density_integrates_to_one():
    # In units of [-1, 1]: x runs over [-3, 4], so that 2x - 1 covers the tails.
    x = torch.linspace(-3, 4, 20001, dtype=torch.float64).view(-1, 1, 1, 1)
    params = torch.tensor([0.3, -1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(len(x), -1, -1, -1)
    density = NormalDecoder(params, 1).log_prob(x).exp().flatten()
    assert torch.trapezoid(density, 2 * x.flatten() - 1).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("case", ["edge_8bit", "typical_5bit_M10"])
def test_logistic_mixture_fixture(data, case):
    mixtures, bits = {"edge_8bit": (2, 8), "typical_5bit_M10": (10, 5)}[case]
    dist = LogisticMixture(data[f"dmol/{case}/param"], 3, mixtures, bits, "nvlabs")
    log_prob = dist.log_prob(data[f"dmol/{case}/x"])
    with use_impl("reference"):  # rounds as the published numbers do
        published = dist.log_prob(data[f"dmol/{case}/x"])
    torch.testing.assert_close(published, data[f"dmol/{case}/log_prob"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_prob, published, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dist.mean, data[f"dmol/{case}/mixture_mean_image"], rtol=1e-6, atol=1e-6)
    fixed = LogisticMixture(data[f"dmol/{case}/param"], 3, mixtures, bits, "fixed").log_prob(data[f"dmol/{case}/x"])
    assert torch.equal(fixed, log_prob) == (bits == 5)


def test_logistic_mixture_samples(data):
    noise = (data["dmol/sample/u_mix_t0.7"], data["dmol/sample/u_logistic_t0.7"])
    dist = LogisticMixture(data["dmol/sample/param"], 3, 3)
    torch.testing.assert_close(dist.sample(0.7, noise), data["dmol/sample/image_t0.7"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("compat", ["nvlabs", "fixed"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "normal", "dmol"])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_factory_and_low_precision(likelihood, channels, compat):
    outputs = output_channels(likelihood, channels, 2)
    assert outputs == {"bernoulli": channels, "normal": 2 * channels, "dmol": {1: 6, 2: 12, 3: 20}[channels]}[likelihood]
    params = torch.randn(2, outputs, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randint(0, 2, (2, channels, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    options = {"likelihood": likelihood, "channels": channels, "num_mixtures": 2, "num_bits": 5, "compat": compat}
    exact = decoder_distribution(params.float(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dist = decoder_distribution(params, **options)
        log_prob, mean = dist.log_prob(x), dist.mean
        image = dist.sample(generator=torch.Generator().manual_seed(2))
    assert log_prob.dtype == mean.dtype == image.dtype == torch.float32
    assert torch.equal(log_prob, exact.log_prob(x)) and torch.equal(mean, exact.mean)
    assert log_prob.shape == ((2, 4, 4) if likelihood == "dmol" else x.shape)
    assert image.shape == mean.shape == x.shape
    assert 0 <= min(image.min(), mean.min()) and max(image.max(), mean.max()) <= 1
    assert torch.equal(image, exact.sample(generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("likelihood", ["bernoulli", "normal", "dmol"])
def test_gradients(likelihood):
    outputs = output_channels(likelihood, 3, 2)
    params = torch.randn(1, outputs, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.tensor([0, 3, 17, 31], dtype=torch.float64).view(1, 1, 2, 2).expand(1, 3, 2, 2) / 31

    def f(p):
        return decoder_distribution(p, likelihood=likelihood, channels=3, num_mixtures=2, num_bits=5).log_prob(x)

    assert torch.autograd.gradcheck(f, params.requires_grad_())


@pytest.mark.parametrize("bits", range(1, 9))
def test_reduce_bits(data, bits):
    levels = torch.arange(256) / 255
    reduced = reduce_bits(levels, bits)
    assert torch.equal(reduced, data[f"pre_process_bits/{bits}"])
    assert len(reduced.unique()) == 2**bits
    # To the bit, from all 256 levels and from the exact ones, in both precisions.
    assert torch.equal(reduce_bits(reduced, bits), reduced)
    own = torch.arange(2**bits) / (2**bits - 1)
    assert torch.equal(reduce_bits(own, bits), own)
    assert torch.equal(reduce_bits(own.double(), bits).float(), own)
    # A value between levels, and one rounded twice.
    half = torch.full((1,), 0.5)
    assert torch.equal(reduce_bits(reduce_bits(half, bits), bits), reduce_bits(half, bits))


def test_reduce_bits_by_hand():
    assert reduce_bits(torch.tensor([0.0, 127 / 255, 128 / 255, 1.0]), 1).tolist() == [0, 0, 1, 1]
    x = torch.tensor([0.123])
    assert reduce_bits(x, 8) is x
    assert reduce_bits(torch.tensor([200 / 255]), 5).item() == pytest.approx(math.floor(200 / 8) / 31)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: output_channels("gauss", 3), "unknown likelihood 'gauss'.*known: bernoulli, dmol, normal"),
        (
            lambda: decoder_distribution(torch.zeros(1, 3, 2, 2), likelihood="normall", channels=3),
            "did you mean normal",
        ),
        (lambda: NormalDecoder(torch.zeros(1, 5, 2, 2), 3), r"shape \(1, 5, 2, 2\): expected \[B, 6, H, W\]"),
        (lambda: LogisticMixture(torch.zeros(1, 10, 2, 2), 3, 2), r"expected \[B, 20, H, W\] for 2 mixtures"),
        (
            lambda: decoder_distribution(torch.zeros(1, 3, 2, 2), likelihood="bernoulli", channels=1),
            r"expected \[B, 1, H, W\] for the Bernoulli",
        ),
        (lambda: NormalDecoder(torch.zeros(1, 6, 2, 2), 3, "nvlab"), "unknown compat 'nvlab': did you mean nvlabs"),
        (lambda: Bernoulli(torch.zeros(1, 1, 2, 2)).sample(0.0), "temperature 0.0: expected a positive"),
        (
            lambda: NormalDecoder(torch.zeros(1, 6, 2, 2), 3).log_prob(torch.zeros(1, 1, 2, 2)),
            r"image of shape \(1, 1, 2, 2\)",
        ),
        (
            lambda: Bernoulli(torch.zeros(1, 3, 2, 2)).sample(noise=torch.zeros(2, 2)),
            r"noise of shape \(2, 2\): expected",
        ),
        (lambda: reduce_bits(torch.zeros(1), 0), "num_bits 0: expected 1 to 8"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InputError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
