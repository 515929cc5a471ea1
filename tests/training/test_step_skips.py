"""Steps that are not finite: they leave everything alone, and are counted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from .stepping import EVENTS, NUMBERS, OPTIONS, Run, batch, moved


def in_batch(run, value):
    x = batch()
    x[3, 0, 5, 5] = value
    return lambda: run.step(x, **NUMBERS)


def in_gradient(run, value):
    weight = run.model.stem.weight
    handle = weight.register_hook(lambda grad: torch.cat([grad.flatten()[:-1], grad.new_tensor([value])]).view(grad.shape))

    def call():
        terms = run()
        handle.remove()
        return terms

    return call


def in_weight(run, value):
    run.model.enc0[1].weight.data.view(-1)[3] = value
    return run


CASES = [(plant, torch.nan, options) for plant in (in_batch, in_gradient, in_weight) for options in OPTIONS]
CASES += [(plant, value, {}) for plant in (in_batch, in_gradient) for value in EVENTS[1:]]


@pytest.mark.parametrize(("plant", "value", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_step_that_is_not_finite_leaves_everything_alone(plant, value, options):
    run = Run(ema_decay=0.9, **options)
    run(2)
    weights = run.model.enc0[1].weight.detach().clone()
    call = plant(run, value)
    before = run.everything()
    for count in (1, 2):
        terms = call() if count == 1 or plant is not in_gradient else plant(run, value)()
        assert terms["skipped"].item() == 1
        assert not moved(before, run.everything())
        assert run.step.skipped.item() == run.step.skipped_in_a_row.item() == count
    run.model.enc0[1].weight.data.copy_(weights)
    terms = run()
    assert terms["skipped"].item() == 0 and terms["total"].isfinite() and terms["grad_norm"].isfinite()
    assert (run.step.skipped.item(), run.step.skipped_in_a_row.item()) == (2, 0)
    changed = moved(before, run.everything())
    assert {name for name in before if "running" in name or "num_batches" in name} <= changed
    assert any(name.startswith("u/") for name in changed)
    assert all(value.isfinite().all() for value in run.model.state_dict().values())


def test_a_skipped_step_changes_no_later_one():
    plain, other = Run(), Run()
    plain(2)
    other(2)
    in_batch(other, torch.nan)()
    plain(3, seed=5)
    other(3, seed=5)
    assert plain.everything() == other.everything()


def test_the_first_step_may_be_skipped():
    run = Run(ema_decay=0.9)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    in_batch(run, torch.nan)()
    after = run.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert all(not s["step"] and not s["exp_avg"].any() and not s["exp_inf"].any() for s in run.optimizer.state.values())
    assert not run()["skipped"]


@pytest.mark.parametrize("value", EVENTS)
def test_a_loss_alone_may_be_the_reason(value):
    run = Run()
    run()
    before, loss = run.everything(), run.step.loss
    run.step.loss = lambda x, **options: (lambda terms: terms | {"total": terms["total"] + value})(loss(x, **options))
    assert run()["skipped"].item() == 1 and not moved(before, run.everything())
    assert all(p.grad is None or p.grad.isfinite().all() for p in run.model.parameters())


def test_processes_agree(monkeypatch):
    """One that finds nothing wrong skips where another one does."""
    run = Run()
    run()
    for others, skipped in ((1.0, 0), (0.0, 1)):
        seen = []

        def all_reduce(votes, op, others=others, seen=seen):
            assert op == torch.distributed.ReduceOp.MIN
            seen.append(votes.item())
            votes.clamp_(max=others)

        fake = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_world_size=lambda: 2,
                               all_reduce=all_reduce, ReduceOp=torch.distributed.ReduceOp)  # fmt: skip
        monkeypatch.setattr("nvae_fast.training.step.dist", fake)
        before = run.everything()
        assert run()["skipped"].item() == skipped and seen == [1.0]
        assert bool(moved(before, run.everything())) != skipped


def test_loss_scale_follows_torchs_rule(monkeypatch):
    monkeypatch.setattr("nvae_fast.training.step.GROWTH_INTERVAL", 3)
    run = Run(precision="fp16")
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    p = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for bad in (0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0):
        (in_batch(run, torch.nan) if bad else run)()
        theirs.scale(p * (torch.nan if bad else 1.0)).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        assert run.step.scale.item() == theirs.get_scale()
    other = Run(precision="fp16")
    other.step.load_state_dict({name: t.clone() for name, t in run.step.state_dict().items()})
    assert all(torch.equal(a, b) for a, b in zip(run.step.state_dict().values(), other.step.state_dict().values(), strict=True))
