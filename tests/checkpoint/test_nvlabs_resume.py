"""Training goes on from an exported file as the public code would go on: moments to the bit, rates on their schedule."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from nvae_fast import NVAE, TrainConfig, save_nvlabs_checkpoint
from nvae_fast.objective import learning_rate
from nvae_fast.optim import make_optimizer


def _exported(model: NVAE, folder: Path, read, **kwargs) -> dict[str, Any]:
    save_nvlabs_checkpoint(model, folder / "exported.pt", **kwargs)
    return read(folder / "exported.pt")


@pytest.mark.parametrize("lr", (0.01, 0.003))
def test_optimizer_goes_on_to_the_bit(official, read, tmp_path, lr):
    model = official.model()
    optimizer = make_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    named = dict(zip(official.order, model.parameters(), strict=True))

    def step(optimizer, params, grads):
        for name, p in params.items():
            p.grad = None if name in official.meta["no_grad_params_train"] else grads[name].clone()
        optimizer.step()

    grads = [{k: torch.randn(p.shape, generator=generator) for k, p in named.items()} for _ in range(3)]
    for group in optimizer.param_groups:
        group["lr"] = lr
    for i in range(2):
        step(optimizer, named, grads[i])
    content = _exported(model, tmp_path, read, optimizer=optimizer)
    assert all(type(s["step"]) is int and s["step"] == 2 for s in content["optimizer"]["state"].values())
    resumed = {k: torch.nn.Parameter(content["state_dict"][k].clone()) for k in official.order}
    other = torch.optim.Adamax(resumed.values(), lr=1.0)
    other.load_state_dict(content["optimizer"])
    for opt, params in ((optimizer, named), (other, resumed)):
        step(opt, params, grads[2])
    assert all(torch.equal(named[k], resumed[k]) for k in named)
    assert other.param_groups[0]["lr"] == lr
    fresh = {k: torch.nn.Parameter(content["state_dict"][k].clone()) for k in official.order}
    step(torch.optim.Adamax(fresh.values(), lr=lr, weight_decay=3e-4, eps=1e-3), fresh, grads[2])
    assert any(not torch.equal(fresh[k], resumed[k]) for k in fresh)  # the moments mattered


def public_rates(c: TrainConfig, steps: int, optimizer, scheduler, epoch: int = 0, step: int = 0, stop: int | None = None):
    """The rate of every step as the public loop sets them, up to the start of epoch `stop`."""
    warmup = c.warmup_epochs * steps
    rates = []
    for e in range(epoch, c.epochs if stop is None else stop):
        if e > c.warmup_epochs:
            scheduler.step()
        for _ in range(steps):
            if step < warmup:
                for group in optimizer.param_groups:
                    group["lr"] = c.learning_rate * step / warmup
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            step += 1
    return rates


def public_pair(c: TrainConfig, params):
    optimizer = torch.optim.Adamax(params, c.learning_rate, weight_decay=c.weight_decay, eps=1e-3)
    return optimizer, CosineAnnealingLR(optimizer, float(c.epochs - c.warmup_epochs - 1), eta_min=c.learning_rate_min)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("warmup", (0, 1, 3))
@pytest.mark.parametrize("given", (False, True), ids=("optimizer rate is stale", "trained so far"))
def test_public_training_resumed_at_any_epoch_follows_the_schedule(tiny, read, tmp_path, warmup, given):
    training = dataclasses.replace(tiny.config.training, epochs=7, warmup_epochs=warmup, learning_rate=0.02)
    model = tiny.model()
    model.config = dataclasses.replace(tiny.config, training=training)
    steps = 4
    schedule = [learning_rate(s, steps, training) for s in range(7 * steps)]
    params = list(model.parameters())
    assert public_rates(training, steps, *public_pair(training, params)) == pytest.approx(schedule, rel=1e-12)
    for epoch in range(8):
        trained = public_pair(training, params)
        public_rates(training, steps, *trained, stop=epoch)
        # a conversion knows the moments, but not the rate of the last step
        optimizer = trained[0] if given else make_optimizer(model)
        content = _exported(model, tmp_path, read, optimizer=optimizer, epoch=epoch, global_step=epoch * steps)
        usual, state = trained[1].state_dict(), content["scheduler"]
        assert usual.keys() <= state.keys()
        for key in ("T_max", "eta_min", "base_lrs", "last_epoch", "_step_count"):
            assert state[key] == usual[key], key
        optimizer, scheduler = public_pair(training, params)
        optimizer.load_state_dict(content["optimizer"])
        scheduler.load_state_dict(state)
        assert optimizer.param_groups[0]["initial_lr"] == training.learning_rate
        rates = public_rates(training, steps, optimizer, scheduler, content["epoch"], content["global_step"])
        assert rates == pytest.approx(schedule[epoch * steps :], rel=1e-12), epoch


def test_in_the_middle_of_an_epoch_the_rate_is_that_of_the_last_whole_one(tiny, read, tmp_path):
    training = tiny.config.training
    content = _exported(tiny.model(), tmp_path, read, epoch=9, global_step=9 * 50 + 7)
    assert content["optimizer"]["param_groups"][0]["lr"] == learning_rate(9 * 50 - 1, 50, training)
    assert content["args"].num_total_iter == 50 * training.epochs


def test_a_scheduler_that_is_given_goes_in_as_it_is(tiny, read, tmp_path):
    model = tiny.model()
    optimizer, scheduler = public_pair(model.config.training, model.parameters())
    optimizer.param_groups[0]["lr"] = 0.123
    for given in (scheduler, scheduler.state_dict()):
        content = _exported(model, tmp_path, read, optimizer=optimizer, scheduler=given, epoch=3, global_step=30)
        assert content["scheduler"] == scheduler.state_dict()
        assert content["optimizer"]["param_groups"][0]["lr"] == 0.123
