"""The terms of the loss, the regularisers, training steps in float32 and bfloat16, compilation."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from models import CONFIG, TERMS, VANILLA, build, images, noise

from nvae_fast import InputError, SpectralState, TrainConfig, use_impl
from nvae_fast.cells import ActConv, Cell
from nvae_fast.objective import balance_kl, kl_alpha, reconstruction_loss


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def one_line(call, *words: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


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
    taken_away = [
        op.conv for cell in model.modules() if isinstance(cell, Cell) for op in cell.ops[:-1] if isinstance(op, ActConv)
    ]
    still = {
        id(conv.bias) for conv in taken_away if not conv.adds_bias
    }  # the batch's statistics take these away: 0, or rounding
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in unused), name
        if name not in unused:
            assert p.grad.isfinite().all(), name
            assert p.grad.abs().max() < 1e-5 if id(p) in still else not torch.equal(p, before[name]), name
    assert still or config.vanilla
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
