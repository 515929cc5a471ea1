"""The likelihood of many draws at a time: the same numbers however they are batched."""

from __future__ import annotations

import json
import math

import pytest
import torch

from nvae_fast import InputError, TrainConfig
from nvae_fast.evaluation import evaluate, noise_generator
from nvae_fast.sampling import PIXELS, decode, show


@pytest.fixture(scope="module")
def images():
    return (torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(3)) > 0.5).float()


def close(a, b, rel=1e-5):
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, rel=rel, abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("changes", [{}, {"num_nf": 1, "training": None, "num_x_bits": 5}], ids=["bernoulli", "flows, dmol"])
def test_draws_side_by_side_are_draws_one_by_one(make, images, changes):
    model = make(**{k: TrainConfig() if v is None else v for k, v in changes.items()})
    one = evaluate(model, [images[:8], images[8:]], num_iw_samples=7, rows=1)
    for rows in (16, 24, 1000):  # two draws of eight images at a time, three (and one over), all
        close(evaluate(model, [images[:8], images[8:]], num_iw_samples=7, rows=rows), one)
    assert not evaluate(model, [images], num_iw_samples=7, seed=1).nelbo == pytest.approx(one.nelbo, abs=1e-4)


@pytest.mark.parametrize("name", ["mnist_small", "cifar10_small", "flow_small", "vanilla_small"])
def test_the_fixtures_bound_in_one_batch(reference_model, fixtures, name, monkeypatch):
    """Three draws in the batch axis, with the fixture's noise: the numbers that the public code got from three passes."""
    model, tensors = reference_model(name)
    groups = range(len(model.config.latent_shapes))
    noise = [torch.cat([tensors[f"{k}/{i:02d}"] for k in ("eval/noise", "iw/noise_k1", "iw/noise_k2")]) for i in groups]
    plain, outputs = model.decode_posterior, []

    def with_their_noise(features, drawn):
        assert [t.shape for t in drawn] == [t.shape for t in noise]
        outputs.append(plain(features, noise))
        return outputs[-1]

    monkeypatch.setattr(model, "decode_posterior", with_their_noise)
    result = evaluate(model, [tensors["input/x_raw"]], num_iw_samples=3)
    scalars = json.loads((fixtures / f"{name}.json").read_text())["scalars"]
    assert len(outputs) == 1
    assert result.nelbo == pytest.approx(scalars["iw/nelbo_K3"], rel=1e-5)
    assert result.neg_log_p == pytest.approx(-scalars["iw/log_p_K3"], rel=1e-5)


def test_more_draws_are_a_tighter_bound(reference_model):
    """IW-NLL falls with 1, 10, 100 draws (Burda et al. 2016, theorem 1), here by more than its standard error; -ELBO stays."""
    model, tensors = reference_model("mnist_small")
    x = tensors["input/x_raw"].repeat(2, 1, 1, 1)
    results = [evaluate(model, [x], num_iw_samples=k) for k in (1, 10, 100)]
    one, ten, hundred = (r.neg_log_p for r in results)
    assert one > ten > hundred
    assert one == pytest.approx(results[0].nelbo, abs=5 * results[0].nelbo_se)
    assert results[2].nelbo == pytest.approx(results[1].nelbo, rel=0.05)
    for r in results:
        assert r.neg_log_p_bpd == pytest.approx(r.neg_log_p / (784 * math.log(2)))  # the 28x28 pixels within the padding


def test_standard_errors_are_those_over_images(make, images):
    model, values = make(), []
    whole = evaluate(model, [x[None] for x in images], num_iw_samples=2, progress=lambda r: values.append(r))
    assert [r.images for r in values] == list(range(1, 13)) and values[-1] == whole
    sums = [r.nelbo * r.images for r in values]
    each = torch.tensor([b - a for a, b in zip([0.0, *sums], sums, strict=False)])
    assert whole.nelbo_se == pytest.approx((each.std() / math.sqrt(12)).item(), rel=1e-3)
    assert math.isnan(values[0].nelbo_se) and values[1].nelbo_se > 0 and whole.neg_log_p_se > 0
    assert sum(whole.active_by_group) == whole.active_channels and len(whole.active_by_group) == 3
    flat = whole.scalars()
    assert flat["kl_group/00"] == whole.kl_groups[0] and flat["active_group/02"] == whole.active_by_group[2] and len(flat) == 6


def test_memory_that_runs_out_means_fewer_at_a_time(make, images, monkeypatch):
    model, sizes = make(), []
    expected = evaluate(model, [images], num_iw_samples=5, rows=1)
    plain = model.decode_posterior

    def small_memory(features, noise):
        sizes.append(len(noise[0]))
        if len(noise[0]) > 30:
            raise torch.OutOfMemoryError("none left")
        return plain(features, noise)

    monkeypatch.setattr(model, "decode_posterior", small_memory)
    close(evaluate(model, [images], num_iw_samples=5, rows=60), expected)
    assert sizes == [60, 24, 24, 12]
    monkeypatch.setattr(model, "decode_posterior", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none left")))
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, [images], num_iw_samples=5)


def test_refused(make, images):
    with pytest.raises(InputError, match="no images"):
        evaluate(make(), [])
    with pytest.raises(InputError, match="num_iw_samples=0"):
        evaluate(make(), [images], num_iw_samples=0)


def test_pixels_are_not_drawn_with_the_noise_of_the_latents(make):
    model = make(training=TrainConfig()).eval()
    latents = [torch.zeros(2, *shape) for shape in model.config.latent_shapes]
    with torch.no_grad():
        logits = model.decode(latents)
    drawn = [show(model, logits, noise_generator(torch.device("cpu"), 3, *stream)) for stream in ((), (PIXELS,))]
    found = decode(model, latents, seed=3)
    assert torch.equal(found, drawn[1]) and not torch.equal(found, drawn[0])


def test_streams_of_noise_do_not_overlap():
    draws = [torch.randn(4, generator=noise_generator(torch.device("cpu"), *s)) for s in ((1,), (1, 0), (1, 1), (1, 2), (2,))]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(d.tolist()) for d in draws}) == 4
