from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Adamax

from nvae_fast.kernels import _impl, use_impl
from nvae_fast.kernels.adamax import Arena
from nvae_fast.optim import FusedAdamax

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
SHAPES = [(), (1,), (7,), (0, 3), (5, 3, 3, 3), (64, 1, 1, 1), (33, 129), (4096,), (70_001,)]
OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"maximize": True},
    {"weight_decay": 0.1, "maximize": True},
    {"betas": (0.3, 0.5), "eps": 1e-3},
]


@pytest.fixture
def only_native(monkeypatch):
    """Fails where a step goes to torch."""
    if NATIVE is None:
        pytest.skip("built without the native extension")
    for place in ("nvae_fast.kernels.adamax.reference.flat_step_", "nvae_fast.optim.adamax"):
        monkeypatch.setattr(place, lambda *a, **k: pytest.fail("torch's own implementation ran"))


@contextlib.contextmanager
def instruction_set(name):
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(name)
    try:
        yield
    finally:
        NATIVE.use_instruction_set(before)


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0, arrange=lambda t: t):
    g = torch.Generator().manual_seed(seed)
    return [Parameter(arrange(torch.randn(s, generator=g).to(dtype))) for s in shapes]


def fill_grads(params, seed, arrange=lambda t: t):
    g = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, generator=g)
        grad[torch.rand(p.shape, generator=g) < 0.1] = 0.0
        p.grad = arrange(grad.to(p))


def run(kind, params, steps=4, arrange=lambda t: t, **options):
    """Parameters, averages and norms after some steps, the learning rate and the gradients changing."""
    optimizer = kind(params, **{"lr": 0.01} | options)
    for i in range(steps):
        fill_grads(params, i, arrange)
        optimizer.param_groups[0]["lr"] *= 0.9
        optimizer.step()
    return values(optimizer)


def values(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state[p] for p in params]
    return [t.detach().clone() for p, s in zip(params, states, strict=True) for t in (p, s["exp_avg"], s["exp_inf"], s["step"])]


def same(a, b):
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_within_budget(within_budget, only_native, options, isa):
    exact = run(Adamax, parameters(torch.float64), foreach=True, **options)
    plain = run(Adamax, parameters(), foreach=True, **options)
    with instruction_set(isa):
        got = run(FusedAdamax, parameters(), **options)
    for a, b, c in zip(got, plain, exact, strict=True):
        within_budget(a, b, c.double())
    for a, b in zip(got, plain, strict=True):  # one step of rounding, four times
        torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("isa", SETS)
def test_one_step_is_torchs_but_for_the_last_bits(only_native, isa):
    plain = run(Adamax, parameters(), 1, foreach=True, weight_decay=0.1)
    with instruction_set(isa):
        got = run(FusedAdamax, parameters(), 1, weight_decay=0.1)
    for i, (a, b) in enumerate(zip(got, plain, strict=True)):
        scale = 1.0 if i % 4 else 4.0  # of the sums: a decayed gradient of nearly 0 is a difference of two numbers
        assert ((a - b).abs() <= 2 * torch.finfo(torch.float32).eps * b.abs().clamp_min(scale)).all()


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 2, 1))[..., 2:-1, 1:-2],
    "axes of length 1": lambda t: t.as_strided(t.shape, [9 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)]),
}
IMAGES = [(6, 5, 3, 4), (17, 8, 1, 1), (1, 3, 2, 2)]


@pytest.mark.parametrize("of_grads", LAYOUTS)
@pytest.mark.parametrize("of_params", ["channels_last", "transposed", "axes of length 1"])
def test_any_strides(only_native, of_params, of_grads):
    plain = run(FusedAdamax, parameters(shapes=IMAGES), weight_decay=0.1)
    params = parameters(shapes=IMAGES, arrange=LAYOUTS[of_params])
    strides = [p.stride() for p in params]
    same(run(FusedAdamax, params, weight_decay=0.1, arrange=LAYOUTS[of_grads]), plain)
    assert [p.stride() for p in params] == strides
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in params)  # saving one saves no other


def test_state_of_another_layout(only_native):
    plain, ours = (FusedAdamax(parameters(shapes=IMAGES)) for _ in range(2))
    for optimizer in (plain, ours):
        fill_grads(optimizer.param_groups[0]["params"], 0)
        optimizer.step()
    for s in ours.state.values():
        s["exp_avg"], s["exp_inf"] = LAYOUTS["window"](s["exp_avg"]), LAYOUTS["channels_last"](s["exp_inf"])
    plain.step()
    ours.step()
    same(values(ours), values(plain))


def moving_parts_them(shapes):
    """Parameters whose memory is not theirs alone, and the memory."""
    flat = torch.cat([p.detach().flatten() for p in parameters(shapes=shapes)])
    return [Parameter(v.view(s)) for v, s in zip(flat.split([15, 1, 360]), shapes, strict=True)], flat


@native
def test_views_of_one_buffer_stay_views():
    shapes = [(3, 5), (1,), (40, 9)]
    views, flat = moving_parts_them(shapes)
    got = run(FusedAdamax, views)
    close(got, run(FusedAdamax, parameters(shapes=shapes)))
    assert torch.equal(flat, torch.cat([t.flatten() for t in got[::4]]))
    p, q = parameters(shapes=[(3,), (3,)])
    q.data = p.data
    run(FusedAdamax, [p, q])
    assert p.data_ptr() == q.data_ptr()


@native
def test_bits_do_not_depend_on_threads_or_company():
    before = torch.get_num_threads()
    shapes = [(n,) for n in (1, 5000, 3, 200_003, 17, 90_000)]
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(FusedAdamax, parameters(shapes=shapes)))
        same(results[0], results[1])
        same(results[0], results[2])
    finally:
        torch.set_num_threads(before)


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nan_and_infinity_as_in_torch(isa, decay):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, 3e38, 1e-44, 1.0]).repeat(5)
    results = []
    for kind in (FusedAdamax, Adamax):
        p = Parameter(odd.repeat_interleave(35))
        optimizer = kind([p], weight_decay=decay, eps=0.0, foreach=True)
        with instruction_set(isa):
            for grad in (torch.ones_like(p), odd.repeat(35), torch.ones_like(p), torch.zeros_like(p)):
                p.grad = grad
                optimizer.step()
        results.append(values(optimizer))
    close(*results)
    assert results[0][0].isnan().any() and results[0][0].isfinite().any()


@native
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"differentiable": True}], ids=str)
def test_what_the_native_code_does_not_take_goes_to_torch(options):
    results = []
    for kind in (FusedAdamax, Adamax):
        kinds = (torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.float32)
        params = [p.requires_grad_(not options.get("differentiable")) for k in kinds for p in parameters(k, [(3, 4)])]
        results.append(run(kind, params, **options))
    same(results[0][4:16], results[1][4:16])
    close(*results)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference(within_budget, options):
    exact = run(Adamax, parameters(torch.float64), foreach=True, **options)
    plain = run(Adamax, parameters(), foreach=True, **options)
    with use_impl("reference"):
        got = run(FusedAdamax, parameters(), **options)
    for a, b, c in zip(got, plain, exact, strict=True):
        within_budget(a, b, c.double())


@native
def test_bad_calls():
    p = parameters(shapes=[(2, 2)])[0]
    for impl in ("cpu", "reference"):
        p.grad = torch.ones(2, 2).to_sparse()
        for optimizer in (FusedAdamax([p]), Adamax([p])):
            with use_impl(impl), pytest.raises(RuntimeError, match="^Adamax does not support sparse gradients"):
                optimizer.step()
    for bad in ({"exp_avg": torch.zeros(3)}, {"exp_inf": torch.zeros(2, 1)}):
        with pytest.raises(
            RuntimeError, match=r"adamax: exp_\w+ of shape .* for a parameter of shape \(2, 2\); load the state"
        ):
            Arena([p], [bad])
