"""A folded model draws and decodes what the model it was made from does."""

from __future__ import annotations

import copy
import gc
import math

import pytest
import torch
from models import CONFIG, VANILLA, build, images, noise

from nvae_fast import folding
from nvae_fast.cells import ARCHITECTURES
from nvae_fast.errors import InputError
from nvae_fast.folding import FoldedNVAE, folded
from nvae_fast.kernels._impl import use_impl
from nvae_fast.layers import InvertedResidual
from nvae_fast.optim import make_optimizer
from nvae_fast.readjust import readjust_bn


def trained(config=CONFIG, dtype=torch.float32, **changes):
    """In eval mode, with statistics, gains and shifts of their own."""
    model = build(config, **changes)
    with torch.no_grad():
        for _ in range(2):
            model(images(model.config, 4))
        for bn in model.batch_norms():
            bn.weight.uniform_(0.5, 1.5)
            bn.bias.normal_(0, 0.3)
            bn.running_mean += 0.3 * torch.randn_like(bn.running_mean)
            bn.running_var *= torch.rand_like(bn.running_var) + 0.5
    return model.to(dtype).to(memory_format=torch.channels_last).eval()


def passes(model, dtype):
    """What every public pass returns, by name."""
    config = model.config
    x, e = images(config, 4).to(dtype), [t.to(dtype) for t in noise(config, 4)]
    out = model.decode_posterior(features := model.bottom_up(x), e)
    found = {"sample": model.sample(4, 0.7, e), "decode": model.decode(e), **out._asdict()}
    return {**found, **{f"features {i}": f for i, f in enumerate(features)}}


@torch.no_grad()
def compare(model, within_budget, dtype=torch.float32, mine=None):
    with use_impl("reference"):
        plain = passes(model, dtype)
        truth = passes(copy.deepcopy(model).double(), torch.float64)
    largest = {n: t.abs().max().item() + rounded(model, truth, n, dtype) for n, t in truth.items()}
    for name, got in passes(folded(model) if mine is None else mine, dtype).items():
        within_budget(got, plain[name], truth[name], largest=largest[name])


def rounded(model, truth, name, dtype):
    """Behind a flow a KL is a difference of densities: float32 sums (in every dtype) of what the largest group, or one of its
    channels, has of log q or log p. In units of eps(dtype); without a flow a KL is a formula of its own."""
    if not (name.startswith("kl") and model.config.num_nf):
        return 0.0
    sizes = [math.prod(shape) for shape in model.config.latent_shapes]
    parts = sum(sizes) / max(sizes) * (model.config.num_latent_per_group if name == "kl_diag" else 1)
    densities = max(truth[n].abs().max().item() for n in ("log_q", "log_p")) / parts
    return densities * torch.finfo(torch.float32).eps / torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch, dtype, within_budget):
    compare(
        trained(dtype=dtype, arch_instance=arch, use_se=arch != "mbconv_sep", num_nf=1, num_channels_enc=8),
        within_budget,
        dtype,
    )


def test_a_model_of_one_group(within_budget):
    compare(trained(VANILLA), within_budget)


def test_without_native_code(within_budget):
    model = trained()
    with use_impl("reference"):
        compare(model, within_budget)  # folded without tables
        mine = passes(folded(model), torch.float32)
        assert torch.equal(mine["sample"], passes(model, torch.float32)["sample"])


@torch.no_grad()
@pytest.mark.parametrize("arch", ["mbconv_sep", "mbconv_den", "res_mbconv"])
def test_under_autocast(arch, within_budget):
    model = trained(arch_instance=arch, num_channels_enc=8)
    with torch.autocast("cpu", torch.bfloat16):
        mine = folded(model)
        with use_impl("reference"):
            plain = passes(model, torch.float32)
        found = passes(mine, torch.float32)
    truth = passes(copy.deepcopy(model).double(), torch.float64)
    for name in ("sample", "decode", "features 0"):
        within_budget(found[name], plain[name], truth[name])
    assert mine.stale and not folded(model).stale
    with pytest.raises(InputError, match="or autocast, have changed"):
        mine.sample(1)


@pytest.mark.parametrize("multiplies", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_both_ways_through_a_branch(multiplies, dtype, within_budget, monkeypatch):
    monkeypatch.setattr(folding, "multiplies", lambda x: multiplies)
    compare(trained(dtype=dtype, arch_instance="mbconv_sep"), within_budget, dtype)


def test_where_products_win():
    def wins(channels, side, dtype=torch.float32):
        return folding.multiplies(torch.empty(2, channels, side, side, dtype=dtype))

    assert wins(480, 8) and not wins(128, 32)
    assert wins(32, 8, torch.bfloat16) and not wins(16, 8, torch.bfloat16)


def test_after_readjustment(within_budget):
    model = trained()
    before = folded(model)
    first = before.sample(2, 0.5, noise())
    assert readjust_bn(model, temperature=0.5, iterations=3, batch_size=4)
    compare(model, within_budget)
    assert not torch.allclose(folded(model).sample(2, 0.5, noise()), first)
    with pytest.raises(InputError, match="have changed since it was folded: fold the model"):
        before.sample(2)


def step(model):
    optimizer = make_optimizer(model)
    model.loss(images())["total"].backward()
    optimizer.step()


def averages(model):
    optimizer = make_optimizer(model, ema_decay=0.9)
    for p in model.parameters():
        optimizer.state[p]["ema"] = p.detach().clone()
    with optimizer.swapped_ema():
        pass


CHANGES = {
    "statistics": lambda model: model.train()(images()),
    "step": step,
    "averages": averages,
    "load": lambda model: model.load_state_dict(model.state_dict()),
    "assign": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_of_a_model_that_changed_it_is_stale(change):
    model = trained(arch_instance="mbconv_sep")
    mine = folded(model)
    mine.sample(1)
    model.sample(1)
    model.train().eval()
    assert not mine.stale
    CHANGES[change](model)
    assert mine.stale
    with pytest.raises(InputError, match="have changed"):
        mine.bottom_up(images())


def test_it_outlives_the_model():
    model = trained()
    expected = folded(model).sample(2, 0.7, noise())
    mine = folded(model)
    del model
    gc.collect()
    assert torch.equal(mine.sample(2, 0.7, noise()), expected) and folded(mine) is mine


def test_what_it_does_not_do(tmp_path):
    model = trained()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    mine = folded(model)
    x = images().requires_grad_()
    assert not any(t.requires_grad for t in (*mine(x), *mine.bottom_up(x))) and not list(mine.parameters())
    for forbidden in (mine.double, mine.state_dict, lambda: mine.load_state_dict(kept), lambda: mine.loss(images()),
                      lambda: mine.save_pretrained(tmp_path / "x")):  # fmt: skip
        with pytest.raises(InputError, match="a folded model only infers"):
            forbidden()
    assert not (tmp_path / "x").exists()
    with pytest.raises(InputError, match="cannot be trained"):
        mine.train()
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items()) and set(kept) == set(model.state_dict())
    assert type(model.eval()(images())) is type(mine(images())) and not isinstance(model, FoldedNVAE)


def test_memory():
    """Branches share their weights; of weight-normalised filters there is one copy."""
    model = trained(arch_instance="mbconv_sep")
    mine = folded(model)
    shared = {t.data_ptr() for t in model.parameters()}
    for branch in (m for m in mine.modules() if isinstance(m, InvertedResidual)):
        assert {m.weight.data_ptr() for m in (branch.expand, branch.depthwise, branch.project)} <= shared
    own = sum(t.numel() for t in mine.buffers() if t.data_ptr() not in shared)
    filters = sum(c.weight.numel() for c in model.convolutions() if hasattr(c, "log_weight_norm"))
    norms = sum(bn.num_features for bn in model.batch_norms())
    assert own < 1.5 * filters + 8 * norms


def test_models_that_cannot_be_folded():
    with pytest.raises(InputError, match="training mode, where statistics are the batch's: call model.eval"):
        folded(build())
    with pytest.raises(InputError, match="still to be initialised from data"):
        folded(build(arch_instance="res_elu").eval())
    with pytest.raises(InputError, match="a Linear cannot be folded"):
        folded(torch.nn.Linear(2, 2))
