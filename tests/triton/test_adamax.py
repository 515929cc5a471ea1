"""adamax's Triton kernels: arenas stepped by them against float64, torch and the C++ code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Adamax

from nvae_fast.kernels import _impl, _triton, use_impl
from nvae_fast.kernels.adamax import Arena, reference
from nvae_fast.optim import FusedAdamax

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
SHAPES = [(), (7,), (0, 3), (5, 3, 3, 3), (64, 1, 1, 1), (33, 41), (2100,)]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True, "weight_decay": 0.1},
    {"betas": (0.3, 0.5), "eps": 1e-3},
    {"betas": (0.0, 0.9)},
]


def parameters(dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(s, generator=g).to(dtype)) for s in shapes]
    params[3].data = params[3].data.contiguous(memory_format=torch.channels_last)
    return params


def fill_grads(params, seed, missing=()):
    g = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g)
        grad[torch.rand(p.shape, generator=g) < 0.1] = 0.0
        p.grad = None if i in missing else grad.to(p)


def values(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = ("exp_avg", "exp_inf", "step", *(["ema"] if getattr(optimizer, "ema_decay", None) is not None else []))
    return [t.detach().clone() for p in params for t in (p, *(optimizer.state[p][name] for name in names))]


def run(kind, params, steps=3, decide=None, **options):
    optimizer = kind(params, **{"lr": 0.01} | options)
    for i in range(steps):
        fill_grads(params, i, missing=(1, 4) if i == 1 else ())
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step(**({} if decide is None else {"decide": decide}))
    return values(optimizer)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_within_budget(within_budget, options):
    exact = run(Adamax, parameters(torch.float64), foreach=True, **options)
    plain = run(Adamax, parameters(), foreach=True, **options)
    for a, b, c in zip(run(FusedAdamax, parameters(), **options), plain, exact, strict=True):
        within_budget(a, b, c.double())


def test_factor_average_and_reruns(within_budget):
    def decide(squares):
        return torch.tensor(0.25), torch.tensor(True)

    def scaled(squares):
        return None, None

    results = {}
    for name, impl in (("ours", "triton"), ("again", "triton"), ("plain", "reference")):
        with use_impl(impl):
            results[name] = run(FusedAdamax, parameters(), decide=decide, ema_decay=0.75, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(results["ours"], results["again"], strict=True))
    for a, b in zip(results["ours"], results["plain"], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)
    loose = run(FusedAdamax, parameters(), decide=scaled, ema_decay=0.75, weight_decay=0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(loose, run(FusedAdamax, parameters(), ema_decay=0.75, weight_decay=0.1), strict=True)
    )


def test_a_step_that_is_not_taken():
    params = parameters()
    optimizer = FusedAdamax(params, ema_decay=0.9, weight_decay=0.1)
    fill_grads(params, 0)
    optimizer.step()
    before = values(optimizer)
    fill_grads(params, 1)
    params[5].grad[3, 3] = torch.nan
    found = []
    optimizer.step(decide=lambda squares: (torch.tensor(0.5), found.append(squares) or squares.isfinite()))
    assert found[0].isnan() and all(torch.equal(a, b) for a, b in zip(before, values(optimizer), strict=True))


def test_nan_stays_in_its_element():
    results = []
    for impl in ("triton", "reference"):
        params = parameters()
        fill_grads(params, 0)
        params[5].grad[3, 3], params[5].grad[4, 4] = torch.nan, torch.inf
        with use_impl(impl):
            FusedAdamax(params).step()
        results.append([p.detach() for p in params])
    assert sum(p.isnan().sum() for p in results[0]) == 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7, equal_nan=True)


@pytest.mark.parametrize("value", [1.0, 1e-30, 3e38, torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize("count", [16, 5008, 70_000])
def test_squares(value, count):
    grad = torch.randn(count, generator=torch.Generator().manual_seed(0)) * (1e-30 if value == 1e-30 else 1.0)
    grad[count // 2] = value
    arena = Arena([Parameter(torch.zeros(count))], [{}])
    arena.params[0].grad = grad
    arena.load()
    got, truth = arena.squares(), reference.flat_squares(grad)
    assert got.dtype == torch.float64 and got.isfinite() == truth.isfinite()
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=0, equal_nan=True) if truth.isfinite() else None
    assert arena._table[0] == grad.data_ptr()
    assert _triton.tasks(count, 1024, 1024)[0] == -(-count // 1024)


def test_squares_of_many_tiles_in_few_programs(monkeypatch):
    monkeypatch.setattr("nvae_fast.kernels.adamax.triton.TASKS", 4)
    params = [Parameter(torch.zeros(n)) for n in (5008, 37, 9000)]
    arena = Arena(params, [{} for _ in params])
    fill_grads(params, 0)
    arena.load()
    torch.testing.assert_close(arena.squares(), sum(p.grad.double().square().sum() for p in params), rtol=1e-6, atol=0)


def test_a_learning_rate_on_the_device():
    rate = torch.tensor(0.25, dtype=torch.float64)
    a, b = run(FusedAdamax, parameters(), lr=0.25, steps=1), run(FusedAdamax, parameters(), lr=rate, steps=1)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def strided(g, kind):
    """g [8, 4, 3, 3] as a gradient may come."""
    if kind == "behind others":
        return torch.cat([torch.full((64,), torch.nan), g.flatten(), torch.full((64,), torch.nan)])[64:-64].view(g.shape)
    if kind == "unaligned":
        return torch.cat([torch.full((1,), torch.nan), g.flatten()])[1:].view(g.shape)
    kinds = {
        "channels_last": lambda: g.contiguous(memory_format=torch.channels_last),
        "every second": lambda: g.repeat_interleave(2, -1)[..., ::2],
        "transposed": lambda: g.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda: g[:1, :1, :1, :1].expand(g.shape),
    }
    return kinds[kind]()


@pytest.mark.parametrize("kind", ["behind others", "unaligned", "channels_last", "every second", "transposed", "expanded"])
@pytest.mark.parametrize("of_param", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_any_strides(kind, of_param):
    """Read where they are, or copied: as torch, and with the sum of their own squares. (37 elements end within a row.)"""
    grads = [torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((8, 4, 3, 3), (37,), (4,), (8, 4, 1, 1))]
    grads[0] = strided(grads[0], kind)
    grads[2] = torch.cat([grads[2], torch.full((60,), torch.nan)])[:4]
    found = []
    for optimizer in (FusedAdamax, Adamax):
        params = [Parameter(torch.linspace(-1, 1, g.numel()).view(g.shape)) for g in grads]
        params[0].data = params[0].data.contiguous(memory_format=of_param)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        seen = []
        more = {"decide": lambda squares, seen=seen: (None, seen.append(squares))} if optimizer is FusedAdamax else {}
        optimizer(params, lr=0.1, weight_decay=0.1).step(**more)
        found.append([p.detach() for p in params])
        if seen:
            torch.testing.assert_close(seen[0], sum(g.double().square().sum() for g in grads), rtol=1e-6, atol=0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


def test_the_table_keeps_what_the_kernels_promise():
    """Addresses in multiples of 16 bytes, ends in multiples of 4 values: a GPU reads as wide as that."""
    grads = [strided(torch.randn(8, 4, 3, 3), kind) for kind in ("unaligned", "behind others", "every second")]
    grads += [torch.randn(37), torch.randn(4), torch.randn(6), torch.randn(12)[2:10]]
    params = [Parameter(torch.zeros(g.shape)) for g in grads]
    arena = Arena(params, [{} for _ in params])
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    arena.load()
    addresses, ends = arena._table.view(-1, 2).unbind(1)
    assert not (addresses % 16).any() and not (ends % 4).any()


@pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
def test_as_in_the_native_code():
    """One step from one state, arenas packed alike."""
    found = []
    for gathered in (True, False):
        params = parameters()
        fill_grads(params, 5)
        arena = Arena(params, [{} for _ in params])
        if not gathered:
            _impl._ops["adamax"] = {"cpu": lambda tensors: None}
        arena.load()
        squares = arena.squares()
        arena.step_(lr=0.01, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
        found.append([squares.float(), arena.param, arena.exp_avg, arena.exp_inf, arena.steps])
    inside = torch.cat([torch.arange(b, b + p.numel()) for b, p in zip(arena._begins, params, strict=True)])
    for a, b in zip(*found, strict=True):
        a, b = (t[inside] if t.dim() and len(t) > len(params) else t for t in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)
