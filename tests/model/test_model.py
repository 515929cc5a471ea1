"""The model as its users meet it: reproducible passes, refused input, sampling, copies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from models import CONFIG, TERMS, VANILLA, build, images, noise
from torch import Tensor

from nvae_fast import InputError
from nvae_fast.distributions import reduce_bits


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_line(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("train", (True, False))
def test_given_noise_makes_a_pass_reproducible_to_the_bit(train):
    model, x = build().train(train), images()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(copy.deepcopy(model)(x, noise()))
    assert equal(*results)
    with torch.no_grad():
        drawn = [model(x), model(x)]
        torch.manual_seed(3)
        again = model.eval()(x)
        torch.manual_seed(3)
        assert equal(again, model(x))
    assert not torch.equal(drawn[0].logits, drawn[1].logits)


def test_shapes_and_orders_of_the_output():
    model = build().eval()
    out = model(images(batch=5), noise(batch=5))
    groups = len(CONFIG.latent_shapes)
    assert CONFIG.latent_shapes == [(3, 4, 6)] * 2 + [(3, 8, 12)] * 2
    assert out.logits.shape == (5, 20, 16, 24)
    assert out.kl_all.shape == (groups, 5) and out.kl_diag.shape == (groups, 3)
    assert out.log_q.shape == out.log_p.shape == (5,)
    torch.testing.assert_close(out.kl_all.mean(1), out.kl_diag.sum(1))
    one = model(images(batch=5)[:1], [n[:1] for n in noise(batch=5)])
    torch.testing.assert_close(one.kl_all, out.kl_all[:, :1])


def test_wrong_images_and_noise_are_refused_in_one_line():
    model, x = build(), images()
    one_line(lambda: model(x[:, :1]), "(2, 1, 16, 24)", "[B, 3, 16, 24]")
    one_line(lambda: model(x[0]), "(3, 16, 24)")
    one_line(lambda: model(x.transpose(2, 3)), "(2, 3, 24, 16)")
    one_line(lambda: model((x * 255).byte()), "torch.uint8", "divide integers by 255")
    one_line(lambda: model.loss(x[..., :8]), "(2, 3, 16, 8)")
    one_line(lambda: model(x, noise()[:-1]), "3 noise or latent tensors")
    one_line(lambda: model(x, noise(batch=3)), "(3, 3, 4, 6)", "(2, 3, 4, 6)")
    one_line(lambda: model(x, noise()[::-1]), "one per group")
    one_line(lambda: model.sample(3, noise=noise()), "one per group")
    one_line(lambda: model.decode(noise()[:2]), "one per group")
    one_line(lambda: model.sample(1, temperature=[0.5, 0.5]), "one per group (4 of them)")
    for temperature in (-1.0, [0.5, -0.5, 0.5, 0.5]):
        one_line(lambda t=temperature: model.sample(1, temperature=t), "must be a number >= 0")


def test_copies_and_states():
    model, x = build(), images()
    model(x)  # nothing of a pass stays behind that a copy would stumble over
    twin = copy.deepcopy(model)
    assert twin.prior_ftr0 is not model.prior_ftr0 and twin.config == model.config
    state = model.state_dict()
    assert all(isinstance(v, Tensor) for v in state.values())
    other = build(seed=5)
    other.load_state_dict(state)
    results = [m.eval()(x, noise()) for m in (model, twin, other)]
    assert equal(results[0], results[1]) and equal(results[0], results[2])
    assert repr(model).startswith("NVAE(\n  (stem): WeightNormConv2d(3, 4, kernel_size=(3, 3)") and "act=swish" in repr(model)


def test_temperature_zero_is_the_prior_mean():
    model = build().eval()
    with torch.no_grad():
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(model.sample(2, temperature=0.0))
        hot = model.sample(2, temperature=1.0)
        mixed = model.sample(2, temperature=[0.0, 0.0, 0.0, 0.0])
        first = [model.sample(2, temperature=[1.0, 0.0, 0.0, 0.0], noise=noise(seed=s)) for s in (3, 4)]
        rest = noise(seed=3)[:1] + noise(seed=4)[1:]
        other = model.sample(2, temperature=[1.0, 0.0, 0.0, 0.0], noise=rest)
    assert torch.equal(*results) and torch.equal(results[0], mixed)
    assert torch.equal(results[0][0], results[0][1]) and not torch.equal(hot[0], hot[1])
    assert not torch.equal(*first)  # the top group is drawn
    assert torch.equal(first[0], other)  # the others are not


def test_sampling_with_a_generator_is_reproducible():
    model = build().eval()
    with torch.no_grad():
        one, two, three = (model.sample(2, generator=torch.Generator().manual_seed(s)) for s in (7, 7, 8))
    assert torch.equal(one, two) and not torch.equal(one, three)


@pytest.mark.parametrize("flows", (0, 1))
@pytest.mark.parametrize("config", (CONFIG, VANILLA), ids=("hierarchical", "vanilla"))
def test_decoding_the_drawn_latents_gives_the_logits_of_the_pass(config, flows, monkeypatch):
    model = build(config, num_nf=flows).eval()
    latents, top_down = [], model._top_down

    def record(draw, batch):
        def wrapped(i, h):
            z, h = draw(i, h)
            latents.append(z)
            return z, h

        return top_down(wrapped, batch)

    with torch.no_grad():
        monkeypatch.setattr(model, "_top_down", record)
        out = model(images(config), noise(config))
        monkeypatch.undo()
        assert [tuple(z.shape[1:]) for z in latents] == model.config.latent_shapes
        assert torch.equal(model.decode(latents), out.logits)
        latents[0] = latents[0] + 1
        assert not torch.equal(model.decode(latents), out.logits)


@pytest.mark.parametrize("bits", (5, 8))
def test_bits_are_reduced_inside_and_once_is_as_good_as_twice(bits):
    model, x = build(num_x_bits=bits).eval(), images()
    reduced = reduce_bits(x, bits)
    assert torch.equal(reduce_bits(reduced, bits), reduced)
    assert torch.equal(reduced, x) == (bits == 8)
    assert equal(model(x, noise()), model(reduced, noise()))
    one, two = (model.loss(given, noise=noise()) for given in (x, reduced))
    assert all(torch.equal(one[k], two[k]) for k in TERMS)


def test_kl_is_analytic_without_flows_and_a_sample_with_them():
    x = images(batch=3)
    plain = build().eval()
    out = plain(x, noise(batch=3))
    assert (out.kl_all >= 0).all()
    assert (out.kl_all.sum(0) - (out.log_q - out.log_p)).abs().min() > 1e-2
    flow = build(num_nf=2).eval()
    for seed in (2, 3):
        out = flow(x, noise(batch=3, seed=seed))
        torch.testing.assert_close(out.kl_all.sum(0), out.log_q - out.log_p, rtol=1e-5, atol=1e-3)


def test_the_sampled_kl_has_the_analytic_one_as_its_mean():
    model, batch = build().eval(), 256
    x = images(batch=1).expand(batch, -1, -1, -1)
    with torch.no_grad():
        out = model(x, noise(batch=batch))
    # z of a group depends on those above: the analytic KL is itself a sample, of smaller variance and the same mean
    difference = out.log_q - out.log_p - out.kl_all.sum(0)
    assert difference.mean().abs() < 4 * difference.std() / math.sqrt(batch)
