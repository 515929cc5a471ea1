"""What arenas add to Adamax: memory in one piece, steps that may be scaled or left out, averages; packing what moved."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.optim import Adamax

from nvae_fast.kernels import use_impl
from nvae_fast.kernels.adamax import Arena, fits
from nvae_fast.optim import FusedAdamax

from .test_adamax import NATIVE, close, fill_grads, native, only_native, parameters, run, same, values  # noqa: F401

IMPLS = ["reference", pytest.param("cpu", marks=native)]
SHAPES = [(64, 1, 1, 1), (33, 129), (17, 3, 5, 5), (4096,), (70_001,)]


def averages(optimizer):
    return [t.clone() for t in optimizer.ema_parameters()]


@native
def test_200_steps_within_budget(within_budget, only_native):  # noqa: F811
    options = {"steps": 200, "weight_decay": 3e-4, "eps": 1e-3, "lr": 1e-3}
    exact = run(Adamax, parameters(torch.float64, SHAPES), foreach=True, **options)
    plain = run(Adamax, parameters(shapes=SHAPES), foreach=True, **options)
    for a, b, c in zip(run(FusedAdamax, parameters(shapes=SHAPES), **options), plain, exact, strict=True):
        within_budget(a, b, c.double())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("groups", [1, 2])
def test_squares_factor_and_take(impl, groups):
    params, plain = parameters(), parameters()
    parts = [slice(0, None)] if groups == 1 else [slice(0, 4), slice(4, None)]
    optimizer, other = (FusedAdamax([{"params": ps[part]} for part in parts], weight_decay=0.1) for ps in (params, plain))
    with use_impl(impl):
        for i, (factor, take) in enumerate([(0.25, True), (None, None), (3.0, False), (torch.nan, False), (0.5, True)]):
            fill_grads(params, i)
            fill_grads(plain, i)
            if i == 4:
                params[5].grad = plain[5].grad = None
            found = []

            def decide(squares, factor=factor, take=take, found=found):
                found.append(squares)
                return (None if factor is None else torch.tensor(factor)), (None if take is None else torch.tensor(take))

            before = values(optimizer) if i else None
            optimizer.step(decide=decide)
            truth = sum(p.grad.double().square().sum() for p in params if p.grad is not None)
            torch.testing.assert_close(found[0], truth, rtol=1e-12, atol=0)
            if take is False:
                same(values(optimizer), before)
                continue
            for p in plain:
                if p.grad is not None:
                    p.grad.mul_(1.0 if factor is None else factor)
            other.step()
            same(values(optimizer), values(other))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-45])
def test_squares_are_finite_just_where_the_gradients_are(impl, value):
    params = parameters()
    fill_grads(params, 0)
    params[-1].grad[-1] = params[4].grad[0, 0, 0, 0] = value
    with use_impl(impl):
        found = []
        FusedAdamax(params).step(decide=lambda squares: (None, found.append(squares) or squares.isfinite()))
    assert found[0].isfinite() == torch.tensor(value).isfinite() and found[0].dtype == torch.float64


@native
def test_squares_have_the_same_bits_for_any_number_of_threads():
    before, found = torch.get_num_threads(), set()
    grads = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 5000, 3, 200_003, 17, 90_000)]
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.add(torch.ops.nvae_fast.adamax_squares(grads).item())
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_averages(impl):
    params = parameters()
    optimizer = FusedAdamax(params, lr=0.1, ema_decay=0.75)
    expected = [p.detach().clone() for p in params]
    close(averages(optimizer), expected)
    with use_impl(impl):
        for i in range(4):
            fill_grads(params, i)
            if i == 2:
                params[3].grad = None
            optimizer.step()
            for n, (mean, p) in enumerate(zip(expected, params, strict=True)):
                if n != 3 or i != 2:
                    mean.lerp_(p.detach(), 0.25)
    close(averages(optimizer), expected)
    weights = [p.detach().clone() for p in params]
    with pytest.raises(KeyError), optimizer.swapped_ema():
        close([p.detach() for p in params], expected)
        raise KeyError
    same([p.detach() for p in params], weights)
    close(averages(optimizer), expected)
    with pytest.raises(RuntimeError, match="averages no parameters: construct it with ema_decay"):
        averages(FusedAdamax(params))
    with pytest.raises(ValueError, match="ema_decay 1.0: expected a number from 0 to below 1"):
        FusedAdamax(params, ema_decay=1.0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_average(duplicate):
    params = parameters()
    optimizer = FusedAdamax(params, ema_decay=0.5)
    for i in range(2):
        fill_grads(params, i)
        optimizer.step()
    other = duplicate(optimizer)
    for each in (optimizer, other):
        fill_grads(each.param_groups[0]["params"], 7)
        each.step()
    same(averages(optimizer), averages(other))
    assert other.ema_decay == 0.5


@native
def test_a_parameter_is_saved_alone():
    params = parameters()
    fill_grads(params, 0)
    optimizer = FusedAdamax(params, ema_decay=0.5)
    optimizer.step()
    tensors = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() and t.storage_offset() == 0 for t in tensors)
    starts = sorted(p.data_ptr() for p in params if p.numel())
    assert starts[-1] - starts[0] < 4 * (sum(p.numel() for p in params) + 16 * len(params))  # yet they lie side by side


def test_the_average_is_saved_and_loaded():
    params, copies = parameters(), parameters()
    optimizer, other, plain = FusedAdamax(params, ema_decay=0.5), FusedAdamax(copies, ema_decay=0.5), Adamax(parameters())
    for i in range(2):
        fill_grads(params, i)
        optimizer.step()
    for p, q in zip(params, copies, strict=True):
        q.data.copy_(p)
    for each in (other, plain):
        each.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other, plain):
        fill_grads(each.param_groups[0]["params"], 5)
        each.step()
    same(averages(optimizer), averages(other))
    same(values(optimizer), values(other))
    late = FusedAdamax(parameters(), ema_decay=0.5)
    late.load_state_dict(plain.state_dict() | {"state": {}})
    close(averages(late), [p.detach() for p in parameters()])


MOVES = {
    "other memory": lambda p: p.detach().clone(),
    "other order": lambda p: p.detach().mT.contiguous().mT,
    "other numbers": lambda p: p.detach() + 1,
    "transposed in place": lambda p: p.detach().mT,
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("move", MOVES)
def test_parameters_that_moved_are_packed_again(impl, move):
    shapes = [(7, 7), (3, 5), (40, 9)]
    results = []
    for kind in (FusedAdamax, Adamax):
        params = parameters(shapes=shapes)
        optimizer = kind(params, lr=0.1)
        with use_impl(impl):
            for i in range(3):
                fill_grads(params, i)
                optimizer.step()
                if i == 0:
                    params[0].data = MOVES[move](params[0])
                    assert kind is Adamax or not optimizer.packed()
        results.append(values(optimizer))
        assert kind is Adamax or (optimizer.packed() and fits(params[0]))
    close(*results)


@native
def test_a_model_that_changes_its_type_takes_torchs_way():
    params = parameters()
    results = []
    for kind in (FusedAdamax, Adamax):
        params = parameters(shapes=[(5, 5), (3,)])
        optimizer = kind(params)
        for i in range(3):
            if i:
                for p in params:
                    p.data = p.data.to(torch.float64 if i == 1 else torch.float32)
                for p, s in optimizer.state.items():
                    s |= {name: s[name].to(p) for name in ("exp_avg", "exp_inf")}
            for p in params:
                p.grad = None
            fill_grads(params, i)
            optimizer.step()
        results.append(values(optimizer))
    close(*results)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_arena_alone(impl):
    """Rows are of 16 elements; what lies between parameters is no one's."""
    params = parameters()
    arena = Arena(params, [{} for _ in params], ema=True)
    assert arena.intact() and all(p.data_ptr() % 64 == arena.param.data_ptr() % 64 for p in params if p.numel())
    with use_impl(impl):
        assert arena.load() == [] and arena.squares() == 0 and arena.step_(lr=1.0, beta1=0.9, beta2=0.999, eps=0.0)
        fill_grads(params, 0)
        assert arena.load() == list(range(len(params)))
        arena.step_(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8)
    assert all(p.isfinite().all() for p in params) and arena.steps.eq(1).all()
    params[2].data = params[2].data.clone()
    with use_impl(impl):
        arena.load()
        assert not arena.intact() and arena.step_(lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8) is False
    assert arena.steps.eq(1).all()
