"""The model as its users meet it: reproducible passes, refused input, sampling, the terms of the loss, copies, compilation."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor

from nvae_fast import NVAE, InputError, NVAEConfig, SpectralState, TrainConfig, use_impl
from nvae_fast.distributions import reduce_bits
from nvae_fast.objective import balance_kl, kl_alpha, reconstruction_loss

CONFIG = NVAEConfig(
    image_size=(16, 24), channels=3, num_mixture_dec=2, num_latent_scales=2, num_groups_per_scale=2, num_latent_per_group=3,
    num_channels_enc=4, num_channels_dec=8, num_preprocess_blocks=1, num_postprocess_blocks=1, num_preprocess_cells=1,
    num_postprocess_cells=1, use_se=True, res_dist=True,
)  # fmt: skip
VANILLA = NVAEConfig(image_size=8, num_latent_scales=1, num_groups_per_scale=1, num_channels_enc=4, num_channels_dec=4,
                     num_latent_per_group=2, num_preprocess_cells=1, num_postprocess_cells=1, likelihood="bernoulli",
                     num_preprocess_blocks=1, num_postprocess_blocks=1)  # fmt: skip
TERMS = {"total", "recon", "kl", "balanced_kl", "kl_all", "kl_coeffs", "spectral", "bn"}


def build(config: NVAEConfig = CONFIG, seed: int = 0, **changes) -> NVAE:
    torch.manual_seed(seed)
    return NVAE(dataclasses.replace(config, **changes))


def images(config: NVAEConfig = CONFIG, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (batch, config.channels, *config.image_size)
    return torch.randint(0, 256, shape, generator=generator) / 255


def noise(config: NVAEConfig = CONFIG, batch: int = 2, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=generator) for shape in config.latent_shapes]


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
    one_line(lambda: model.sample(1, temperature=-1.0), "must be a number >= 0")


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
            latents.append(draw(i, h))
            return latents[-1]

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


def test_terms_of_the_loss():
    model, x = build().train(), images()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    terms = model.loss(x, kl_coeff=0.3, spectral_coeff=0.1, noise=noise(), spectral=SpectralState())
    model.load_state_dict(state)
    out = model(x, noise())
    assert TERMS <= terms.keys()
    recon = reconstruction_loss(model.decoder_output(out.logits), x)
    balanced, gamma = balance_kl(out.kl_all, 0.3, kl_alpha([2, 2]))
    for name, value in (("recon", recon), ("balanced_kl", balanced), ("kl_coeffs", gamma), ("kl_all", out.kl_all),
                        ("kl", out.kl_all.sum(0))):  # fmt: skip
        torch.testing.assert_close(terms[name], value)
    assert terms["kl_coeffs"].mean().item() == pytest.approx(1) and not terms["kl_coeffs"].requires_grad
    bn = sum(m.weight.abs().max() for m in model.batch_norms())
    sigma = sum(
        torch.linalg.matrix_norm(w.flatten(1), ord=2)
        for w in (c.effective_weight() if hasattr(c, "effective_weight") else c.weight for c in model.convolutions())
    )
    torch.testing.assert_close(terms["bn"], bn)
    assert 0.9 * sigma < terms["spectral"] <= sigma * (1 + 1e-5)  # power iteration comes from below
    total = (recon + balanced).mean() + 0.1 * (terms["spectral"] + bn)
    torch.testing.assert_close(terms["total"], total)
    assert terms["total"].shape == terms["spectral"].shape == terms["bn"].shape == ()


def test_regularisers_cost_nothing_while_their_weight_is_zero():
    terms = build().loss(images(), noise=noise())
    assert terms["spectral"] == 0 and terms["bn"] == 0
    torch.testing.assert_close(terms["total"], (terms["recon"] + terms["kl"]).mean())


def test_evaluation_does_not_balance():
    model, x = build().eval(), images()
    terms = model.loss(x, kl_coeff=0.3, noise=noise())
    assert torch.equal(terms["kl_coeffs"], torch.ones(4))
    torch.testing.assert_close(terms["balanced_kl"], 0.3 * terms["kl"])


def test_spectral_state():
    model, x = build(), images()
    state = SpectralState()
    convolutions = model.convolutions()
    with torch.no_grad():
        state(convolutions)
        other = SpectralState(seed=9)
        other.load_state_dict(copy.deepcopy(state.state_dict()))
        values = [s(convolutions) for s in (state, other)]
    assert torch.equal(*values)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.state_dict().items())
    assert {tuple(u.shape) for u in state.u.values()} and state.u.keys() == state.v.keys()
    assert sum(len(u) for u in state.u.values()) == len(convolutions)
    model.eval()
    drawn = [model.loss(x, spectral_coeff=0.1, noise=noise()) for _ in range(2)]  # without a state: a fresh one
    fresh = model.loss(x, spectral_coeff=0.1, noise=noise(), spectral=SpectralState())
    assert drawn[0]["total"] == drawn[1]["total"] == fresh["total"] and drawn[0]["spectral"] > 0
    with torch.no_grad():
        one_line(lambda: state(convolutions + convolutions[:1]), "spectral state holds")


@pytest.mark.parametrize("config", (CONFIG, dataclasses.replace(CONFIG, num_nf=1, use_se=False, res_dist=False), VANILLA),
                         ids=("residual", "flows", "vanilla"))  # fmt: skip
@pytest.mark.parametrize("bf16", (False, True), ids=("float32", "bfloat16"))
def test_a_training_step_reaches_every_parameter(config, bf16):
    model, x = build(config).train(), images(config)
    optimizer = torch.optim.Adamax(model.parameters(), 1e-3)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        terms = model.loss(x, kl_coeff=0.5, spectral_coeff=0.1, noise=noise(config), spectral=SpectralState())
    assert terms["total"].isfinite() and terms["total"].dtype == torch.float32
    terms["total"].backward()
    optimizer.step()
    unused = {"prior_ftr0"} if config.vanilla else set()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in unused), name
        if name not in unused:
            assert p.grad.isfinite().all() and not torch.equal(p, before[name]), name
    for bn in model.batch_norms():
        assert bn.num_batches_tracked == 1


def test_bfloat16_is_as_close_to_float64_as_the_plain_ops_are():
    """Root mean square over the batch: at most twice the error of the plain ops under the same autocast, plus rounding."""
    model, x = build().eval(), images(batch=8)
    exact = copy.deepcopy(model).double()(x.double(), [n.double() for n in noise(batch=8)])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(x, noise(batch=8))
        with use_impl("reference"):
            plain = model(x, noise(batch=8))
    for name in got._fields:
        ref = getattr(exact, name)
        error, plain_error = ((getattr(o, name).double() - ref).square().mean().sqrt() for o in (got, plain))
        assert error <= 2 * (plain_error + torch.finfo(torch.bfloat16).eps * ref.abs().max()), name
        assert plain_error < 0.05 * ref.square().mean().sqrt(), name  # which would else excuse anything
    assert got.kl_all.dtype == got.log_q.dtype == torch.float32


def test_vanilla_model_learns():
    config = dataclasses.replace(VANILLA, training=TrainConfig(binarize=True))
    model, x = build(config).train(), images(config, batch=4).round()
    optimizer = torch.optim.Adamax(model.parameters(), 0.01)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        terms = model.loss(x, noise=noise(config, 4))
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_agrees_in_one_graph():
    config = dataclasses.replace(CONFIG, image_size=8, num_latent_scales=1, num_preprocess_blocks=0, num_postprocess_blocks=0)
    model, x = build(config).train(), images(config)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    results = []
    for m in (model, compiled):
        out = m(x, noise(config))
        (out.logits.sum() + out.kl_all.sum()).backward()
        results.append((out, [p.grad for p in m.parameters()], list(m.buffers())))
    for got, expected in zip(results[1], results[0], strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * max(b.abs().max().item(), 1e-2) if b.numel() else 0)
    torch._dynamo.reset()


def test_float64_and_channels_last():
    model, x = build().eval(), images()
    double = copy.deepcopy(model).double()(x.double(), [n.double() for n in noise()])
    assert all(t.dtype == torch.float64 for t in double)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    out = last(x.to(memory_format=torch.channels_last), noise())
    torch.testing.assert_close(out.logits, model(x, noise()).logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.logits.double(), double.logits, rtol=1e-4, atol=1e-5)
