"""The model against numbers of the public reference: forward, losses, regularisers, gradients, one optimiser step, BN."""

from __future__ import annotations

import math

import pytest
import torch

from nvae_fast import NVAE, SpectralState
from nvae_fast.checkpoint.nvlabs import official_module_names, to_nvlabs_state_dict
from nvae_fast.objective import balance_kl, kl_alpha, reconstruction_loss

LOGITS = dict(atol=1e-4, rtol=1e-5)
NATS = dict(atol=1e-2, rtol=1e-5)


def official_parameters(model: NVAE) -> dict[str, torch.nn.Parameter]:
    names = official_module_names(model)
    out = {}
    for key, p in model.named_parameters():
        owner, _, leaf = key.rpartition(".")
        out[f"{names[owner]}.{leaf}" if owner else key] = p
    return out


def train_pass(ref, dtype=torch.float32):
    """A train-mode loss, its gradient, and the model, from the fixture's state."""
    model = ref.model(dtype).train()
    spectral = SpectralState()
    start = {f"{letter}/{k}": t.to(dtype) for letter in "uv" for k, t in ref.under(f"sr/{letter}0/").items()}
    spectral.load_state_dict(start, warm=False)
    terms = model.loss(ref.x.to(dtype), kl_coeff=ref.meta["kl_coeff"], spectral_coeff=ref.meta["wdn_coeff"],
                       noise=[n.to(dtype) for n in ref.noise("train/noise/")], spectral=spectral)  # fmt: skip
    terms["total"].backward()
    return model, terms, spectral


def gradient_gate(ref) -> float:
    """Relative L2 error allowed to a parameter's gradient: twice that of the reference's own float32, at least 1e-3."""
    return max(1e-3, 2 * ref.meta["float32_vs_float64_max_abs_diff"]["train/grad_rel_l2_max"])


def test_state_round_trip_is_exact_and_keys_are_the_official_ones(ref):
    state = ref.under("state/")
    exported = to_nvlabs_state_dict(ref.model())
    assert exported.keys() == state.keys()
    assert all(torch.equal(exported[k], state[k]) for k in state)


def test_parameters_come_in_the_official_order(ref):
    assert list(official_parameters(ref.model())) == ref.meta["param_order"]


def test_eval_pass(ref):
    model = ref.model().eval()
    with torch.no_grad():
        out = model(ref.x, ref.noise("eval/noise/"))
    torch.testing.assert_close(out.logits, ref["eval/logits"], **LOGITS)
    for name in ("kl_all", "kl_diag", "log_q", "log_p"):
        torch.testing.assert_close(getattr(out, name), ref[f"eval/{name}"], **NATS)
    x = ref.tensors.get("input/x", ref.x)
    recon = reconstruction_loss(model.decoder_output(out.logits), x, model.config.padding)
    torch.testing.assert_close(recon, ref["eval/recon"], **NATS)
    nelbo = recon + out.kl_all.sum(0)
    torch.testing.assert_close(nelbo, ref["eval/nelbo"], **NATS)
    torch.testing.assert_close(-recon - out.log_q + out.log_p, ref["eval/log_iw"], **NATS)
    bpd = nelbo.mean().item() / (math.log(2) * model.config.data_dims)
    assert bpd == pytest.approx(ref.meta["scalars"]["eval/bpd_elbo"], rel=1e-5)


def test_eval_pass_agrees_with_the_loss_terms(ref):
    model = ref.model().eval()
    with torch.no_grad():
        terms = model.loss(ref.x, noise=ref.noise("eval/noise/"))
    torch.testing.assert_close(terms["total"], ref["eval/nelbo"].mean(), **NATS)
    torch.testing.assert_close(terms["kl_coeffs"], torch.ones_like(terms["kl_coeffs"]))


def test_train_pass(ref):
    model, terms, spectral = train_pass(ref)
    torch.testing.assert_close(terms["logits"], ref["train/logits"], **LOGITS)
    for name in ("kl_all", "kl_diag", "log_q", "log_p", "recon", "balanced_kl"):
        torch.testing.assert_close(terms[name].detach(), ref[f"train/{name}"], **NATS)
    torch.testing.assert_close(terms["kl_coeffs"], ref["train/kl_coeffs"], rtol=1e-5, atol=1e-6)
    unbalanced, _ = balance_kl(terms["kl_all"], 1.0, kl_alpha(model.config.groups_per_scale))
    torch.testing.assert_close(unbalanced.detach(), ref["train/balanced_kl_coeff1"], **NATS)
    scalars = ref.meta["scalars"]
    assert terms["spectral"].item() == pytest.approx(scalars["train/sr_loss_call1"], rel=1e-5)
    assert terms["bn"].item() == pytest.approx(scalars["train/bn_loss"], rel=1e-5)
    assert terms["total"].item() == pytest.approx(scalars["train/total_loss"], rel=1e-5)
    for letter in "uv":
        for shape, vectors in ref.under(f"sr/{letter}_call1/").items():
            got = spectral.state_dict()[f"{letter}/{shape}"]
            torch.testing.assert_close(got, vectors, atol=2e-3, rtol=0)
    with torch.no_grad():
        again = spectral(ref.model().convolutions())
    assert again.item() == pytest.approx(scalars["train/sr_loss_call2"], rel=1e-5)


def test_spectral_layers_are_stacked_in_the_official_order(ref):
    model = ref.model()
    names = official_module_names(model)
    groups: dict[str, list[str]] = {}
    for name, conv in model.named_modules():
        if isinstance(conv, torch.nn.Conv2d):
            groups.setdefault(f"{conv.weight.shape[0]}x{conv.weight[0].numel()}", []).append(names[name])
    assert groups == ref.meta["sr_groups"]


def test_running_statistics_after_one_training_pass(ref):
    model, _, _ = train_pass(ref)
    state = to_nvlabs_state_dict(model)
    expected = ref.under("train/bn_after/")
    assert expected
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-5)
    counts = {k: v for k, v in state.items() if k.endswith("num_batches_tracked")}
    assert counts and all(v.item() == 8 for v in counts.values())


def test_gradients(ref):
    model, _, _ = train_pass(ref)
    gate = gradient_gate(ref)
    stats, zero = ref.meta["train_grad_stats"], set(ref.meta["zero_grad_params_train"])
    total = math.sqrt(sum(s["l2"] ** 2 for s in stats.values() if s))
    params = official_parameters(model)
    for name, p in params.items():
        s = stats[name]
        if s is None:
            assert name in ref.meta["no_grad_params_train"] and p.grad is None
        elif name in zero:
            assert p.grad.norm().item() <= 1e-5 * total
        else:
            assert p.grad.norm().item() == pytest.approx(s["l2"], rel=gate, abs=1e-6), name
            first = torch.tensor(s["first"])
            torch.testing.assert_close(p.grad.flatten()[: len(first)], first, rtol=gate, atol=gate * s["l2"])
    full = ref.under("train/grad/")
    assert full
    for name, expected in full.items():
        if name not in zero:
            error = (params[name].grad - expected).norm() / expected.norm()
            assert error <= gate, (name, error)


def test_float64_agrees_with_the_reference_in_float64(ref):
    _, terms, _ = train_pass(ref, torch.float64)
    assert terms["total"].item() == pytest.approx(ref.meta["scalars"]["train/total_loss_f64"], rel=2e-8)


def test_one_adamax_step(ref):
    model, _, _ = train_pass(ref)
    lr, eps = 0.01, 1e-3
    optimizer = torch.optim.Adamax(model.parameters(), lr=lr, weight_decay=3e-4, eps=eps, betas=(0.9, 0.999))
    optimizer.step()
    params, zero = official_parameters(model), set(ref.meta["zero_grad_params_train"])
    gate = gradient_gate(ref)
    for name, expected in ref.under("train/param_after/").items():
        if name not in zero:
            # The first step is lr g / (|g| + eps): an error of the gradient's gate grows by lr eps / (|g| + eps)^2.
            g = params[name].grad
            slope = lr * eps / (g.abs() + eps).square()
            derived = (slope * gate * g.square().mean().sqrt()).norm() + 1e-6 * expected.norm()
            # Where one gradient is near 0 that says little: never more than 1 % of the way that the parameter went.
            moved = (expected - ref[f"state/{name}"]).norm()
            assert (params[name] - expected).norm() <= min(derived, 1e-2 * moved + 1e-6), name
    for name, s in ref.meta["param_after_step_stats"].items():
        if name not in zero and s is not None:
            assert params[name].norm().item() == pytest.approx(s["l2"], rel=1e-4, abs=1e-5), name


def test_prior_samples(ref):
    model = ref.model().eval()
    with torch.no_grad():
        logits = model.sample(2, temperature=0.7, noise=ref.noise("sample/noise/"))
        torch.testing.assert_close(logits, ref["sample/logits"], **LOGITS)
        dist = model.decoder_output(logits)
        if model.config.output_likelihood == "bernoulli":
            torch.testing.assert_close(dist.mean, ref["sample/image"], **LOGITS)
        elif model.config.output_likelihood == "normal":
            image = dist.sample(noise=ref["sample/noise_decoder"])
            torch.testing.assert_close(image, ref["sample/image"], **LOGITS)
        else:
            torch.testing.assert_close(dist.mean, ref["sample/mixture_mean_image"], **LOGITS)
            noise = (ref["sample/uniform_mixture"], ref["sample/uniform_logistic"])
            torch.testing.assert_close(dist.sample(noise=noise), ref["sample/image_t1"], **LOGITS)


def test_temperature_one_per_group_equals_one_number(ref):
    model = ref.model().eval()
    groups = len(model.config.latent_shapes)
    with torch.no_grad():
        one, each = (model.sample(2, t, noise=ref.noise("sample/noise/")) for t in (0.7, [0.7] * groups))
    assert torch.equal(one, each)


def test_bn_readjustment(ref):
    model = ref.model().train()
    with torch.no_grad():
        for j in range(2):
            model.sample(2, temperature=0.7, noise=ref.noise(f"readjust/noise_{j}/"))
    state, before = to_nvlabs_state_dict(model), ref.under("state/")
    changed = {k for k in state if "running" in k and not torch.equal(state[k], before[k])}
    expected = ref.under("readjust/bn_after/")
    assert changed == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-5)


def test_importance_weighted_bound(ref):
    model = ref.model().eval()
    with torch.no_grad():
        features = model.bottom_up(ref.x)
        columns = []
        for noise in ("eval/noise/", "iw/noise_k1/", "iw/noise_k2/"):
            out = model.decode_posterior(features, ref.noise(noise))
            x = ref.tensors.get("input/x", ref.x)
            recon = reconstruction_loss(model.decoder_output(out.logits), x, model.config.padding)
            columns.append(-recon - out.log_q + out.log_p)
    log_iw = torch.stack(columns, 1)
    torch.testing.assert_close(log_iw, ref["iw/log_iw"], **NATS)
    bound = (log_iw.logsumexp(1) - math.log(3)).mean().item()
    assert bound == pytest.approx(ref.meta["scalars"]["iw/log_p_K3"], rel=1e-5)
