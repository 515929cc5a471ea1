"""FusedAdamax as an optimiser: state, groups, schedulers, copies. Every test fails where a step goes to torch."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Adamax

from nvae_fast import NVAE, PRESETS
from nvae_fast.optim import FusedAdamax, make_optimizer

from .test_adamax import close, fill_grads, only_native, parameters, run, same, values  # noqa: F401 (the fixture below)

pytestmark = pytest.mark.usefixtures("only_native")


def test_absent_gradients_and_steps_that_differ():
    results = []
    for kind in (FusedAdamax, Adamax):
        params = parameters()
        optimizer = kind(params, foreach=True)
        optimizer.step()
        assert not optimizer.state
        for i in range(6):
            fill_grads(params, i)
            for p in params[i % 3 :: 3]:
                p.grad = None
            if i == 3:
                optimizer.zero_grad()
            optimizer.step()
        results.append(values(optimizer))
    assert len({s.item() for s in results[0][3::4]}) > 1
    close(*results)


def test_groups_schedulers_and_closures():
    results = []
    for kind in (FusedAdamax, Adamax):
        params = parameters()
        optimizer = kind([{"params": params[:4]}, {"params": params[4:6], "lr": 0.1, "betas": (0.5, 0.9)}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        calls = []
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append(1))
        for i in range(5):
            if i == 2:
                optimizer.add_param_group({"params": params[6:], "weight_decay": 0.3})

            def loss(i=i, params=params, optimizer=optimizer):
                optimizer.zero_grad()
                total = sum((p - i).square().sum() for p in params)
                total.backward()
                return total

            assert optimizer.step(loss).requires_grad
            schedule.step()
        assert len(calls) == 5
        results.append(values(optimizer))
    close(*results)


def test_a_learning_rate_as_tensor():
    close(run(FusedAdamax, parameters(), lr=torch.tensor(0.25)), run(FusedAdamax, parameters(), lr=0.25))


@pytest.mark.parametrize("kinds", [(Adamax, FusedAdamax), (FusedAdamax, Adamax), (FusedAdamax, FusedAdamax)], ids=str)
def test_state_goes_both_ways(kinds):
    params = parameters()
    first = kinds[0](params, lr=0.01, weight_decay=0.1)
    fill_grads(params, 0)
    first.step()
    copies = [Parameter(p.detach().clone()) for p in params]
    second = kinds[1](copies)
    fill_grads(copies, 9)
    second.step()  # to be overwritten
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    a, b = first.state_dict(), second.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert [[(k, v.dtype, v.shape) for k, v in s.items()] for s in a["state"].values()] == [
        [(k, v.dtype, v.shape) for k, v in s.items()] for s in b["state"].values()
    ]
    for optimizer, tensors in ((first, params), (second, copies)):
        for i in (1, 2):
            fill_grads(tensors, i)
            optimizer.step()
    close(values(first), values(second))


def test_states_of_old_versions_hold_numbers():
    params = parameters()
    fill_grads(params, 0)
    optimizer = FusedAdamax(params)
    optimizer.step()
    content = optimizer.state_dict()
    for s in content["state"].values():
        s["step"] = 1
    optimizer.load_state_dict(content)
    optimizer.step()
    assert all(s["step"].item() == 2 for s in optimizer.state.values())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(duplicate):
    params = parameters()
    fill_grads(params, 0)
    optimizer = FusedAdamax(params, weight_decay=0.1)
    optimizer.step()
    other = duplicate(optimizer)
    fill_grads(other.param_groups[0]["params"], 1)
    fill_grads(params, 1)
    before = values(optimizer)
    other.step()
    same(values(optimizer), before)
    optimizer.step()
    same(values(optimizer), values(other))


def test_state_that_others_replace_is_what_counts():
    params = parameters()
    fill_grads(params, 0)
    optimizer = FusedAdamax(params)
    for i in range(3):
        optimizer.step()
        if i == 0:
            optimizer.state[params[2]] = {}
        if i == 1:
            optimizer.state[params[4]]["exp_inf"] = torch.ones_like(params[4])
            params[6].data = params[6].detach().clone()
    assert optimizer.state[params[2]]["step"].item() == 2
    assert (optimizer.state[params[4]]["exp_inf"] >= 0.99).all()
    assert optimizer.state[params[6]]["step"].item() == 3


def test_autograd_notices():
    (p,) = parameters(shapes=[(3,)])
    out = p.square().sum()
    p.grad = torch.ones(3)
    FusedAdamax([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_make_optimizer_is_fused():
    assert type(make_optimizer(NVAE(PRESETS["demo"]))) is FusedAdamax
