"""The native logistic_mixture_log_prob against float64, and at extremes."""

from __future__ import annotations

import itertools

import pytest
import torch
from mixtures import DTYPES, NATIVE, SETS, agrees, make, native, run
from safetensors.torch import load_file

from nvae_fast.kernels import use_impl
from nvae_fast.kernels.logistic_mixture import logistic_mixture_log_prob

pytestmark = native


@pytest.fixture
def use_set():
    before = NATIVE.instruction_set()
    yield lambda name: NATIVE.use_instruction_set(name)
    NATIVE.use_instruction_set(before)


# name: (rows of the params of 3 channels and 2 mixtures, value); colour c begins at 2 + 6 c with 2 means, 2 log-scales.
EXTREMES = {
    "log-scales at the clamp": (slice(4, 6), -7.0),
    "log-scales below the clamp": (slice(4, 6), -9.0),
    "log-scales far below the clamp": (slice(4, 6), -1e4),
    "large log-scales": (slice(4, 6), 9.0),
    "log-scales of 30": (slice(4, 6), 30.0),
    "log-scales beyond exp's range": (slice(4, 6), 1e3),
    "means above": (slice(2, 4), 40.0),
    "means below": (slice(8, 10), -40.0),
    "means far outside": (slice(2, 4), 1e4),
    "saturated coefficients": (slice(6, 8), -40.0),
    "a dominant logit": (slice(0, 1), 90.0),
    "one logit far below": (slice(1, 2), -1e4),
}


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("compat", ["nvlabs", "fixed"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_within_budget(within_budget, use_set, dtype, scale, compat, isa):
    assert use_set(isa)
    for channels, mixtures, bits in itertools.product((1, 2, 3, 4), (1, 2, 10), (1, 2, 5, 8)):
        size = (1, 11, 13) if mixtures == 2 else (2, 5, 7)
        x, params = make(channels, mixtures, bits, size, dtype, scale)
        agrees(within_budget, x, params, mixtures=mixtures, bits=bits, compat=compat)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_depth_and_many_mixtures(within_budget, use_set, bits, isa):
    assert use_set(isa)
    for mixtures, size in ((30, (1, 3, 50)), (57, (1, 1, 3)), (3, (3, 16, 24))):
        x, params = make(3, mixtures, bits, size)
        agrees(within_budget, x, params, mixtures=mixtures, bits=bits)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extremes(within_budget, use_set, extreme, bits, isa):
    assert use_set(isa)
    rows, value = EXTREMES[extreme]
    x, params = make(bits=bits, size=(2, 9, 8))
    params[:, rows] = value
    for compat in ("nvlabs", "fixed"):
        agrees(within_budget, x, params, bits=bits, compat=compat)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("channels", [5, 17])
def test_more_channels_than_a_product_of_probabilities_holds(within_budget, use_set, channels, isa):
    assert use_set(isa)
    x, params = make(channels, 2, size=(1, 5, 7), scale=4.0)
    agrees(within_budget, x, params)


@pytest.mark.parametrize("isa", SETS)
def test_nearly_saturated_coefficients_keep_the_digits_of_their_slopes(use_set, isa):
    assert use_set(isa)
    x, params = make(size=(2, 9, 8))
    rows = [6, 7, 12, 13, 18, 19]
    params[:, rows] = (params[:, rows].sign() * 5.0) + params[:, rows]
    (_, got), (_, exact) = run(x, params, "cpu"), run(x.double(), params.double(), "reference")
    for row in rows:
        torch.testing.assert_close(got[:, row].double(), exact[:, row], rtol=1e-4, atol=1e-6 * exact[:, row].abs().max().item())


@pytest.mark.parametrize("bits", [5, 8])
def test_narrow_components_in_the_middle_of_their_bins(within_budget, bits):
    x, params = make(1, 1, bits, (1, 8, 16))
    params[:, 1:2] = 2 * x - 1 + 0.3 * params[:, :1] / (2**bits - 1)
    for log_scale in (-7.0, -6.0, -5.0, -3.0, -1.0, 0.0):
        params[:, 2] = log_scale
        agrees(within_budget, x, params, mixtures=1, bits=bits, compat="fixed")


@pytest.mark.parametrize("case", ["edge_8bit", "edge_5bit", "typical_8bit_M10", "typical_5bit_M10"])
def test_fixture(within_budget, fixtures, case):
    f = load_file(fixtures / "dists_and_schedules.safetensors")
    x, params = (f[f"dmol/{case}/{name}"] for name in ("x", "param"))
    mixtures, bits = 10 if "M10" in case else 2, int(case.split("_")[1][0])
    out, grad = run(x, params, "cpu", mixtures, bits, grad=torch.ones(len(x), *x.shape[2:]))
    within_budget(out, f[f"dmol/{case}/log_prob"], f[f"dmol/{case}/log_prob_f64"])
    exact = run(x.double(), params.double(), "reference", mixtures, bits, grad=torch.ones_like(out).double())[1]
    within_budget(grad, f[f"dmol/{case}/grad_of_sum_wrt_param"], exact)


def test_the_clamp_has_a_gradient_at_equality_and_none_below():
    x, params = make()
    for value, live in ((-7.0, True), (-7.5, False)):
        params[:, 4:6] = value
        for impl in ("cpu", "reference"):
            assert run(x, params, impl)[1][:, 4:6].ne(0).any() == live


@pytest.mark.parametrize("compat", ["nvlabs", "fixed"])
def test_level_254(compat):
    x = torch.full((1, 1, 1, 1), 254 / 255)
    params = torch.tensor([0.0, 0.9, -2.0]).view(1, 3, 1, 1)
    own, plain = (run(x, params, impl, 1, compat=compat) for impl in ("cpu", "reference"))
    assert (own[0].exp() > 0.1) == (compat == "nvlabs")
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_thread_count_does_not_change_a_bit():
    x, params = make(mixtures=5, size=(3, 17, 31))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(x, params, "cpu", 5))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivative_is_refused_with_the_cure():
    x, params = make()
    params.requires_grad_()
    out = logistic_mixture_log_prob(x, params, num_mixtures=2, impl="cpu")
    (first,) = torch.autograd.grad(out.sum(), params, create_graph=True)
    assert first.isfinite().all()
    with pytest.raises(RuntimeError, match=r"logistic_mixture_log_prob.*use impl='reference' to differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
def test_compiles_without_a_graph_break(impl):
    x, params = make()

    def f(p):
        return logistic_mixture_log_prob(x, p, num_mixtures=2, impl=impl).square().sum()

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        leaf = params.clone().requires_grad_()
        found.append(torch.autograd.grad(g(leaf), leaf))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("isa", SETS)
def test_nan_stays_in_its_pixel(use_set, isa):
    assert use_set(isa)
    for channel in range(20):
        x, params = make(size=(1, 4, 6))
        params[0, channel, 2, 3] = torch.nan
        (out, grad), (plain, plain_grad) = (run(x, params, impl) for impl in ("cpu", "reference"))
        assert torch.equal(out.isnan(), plain.isnan()) and out.isnan().sum() == 1
        elsewhere = torch.ones(4, 6, dtype=torch.bool)
        elsewhere[2, 3] = False
        assert grad[..., elsewhere].isfinite().all()
        assert (grad.isnan() | ~plain_grad.isnan()).all()
    x, params = make(size=(1, 4, 6))
    x[0, 1, 2, 3] = torch.nan
    out, grad = run(x, params, "cpu")
    assert out[0, 2, 3].isnan() and out.isnan().sum() == 1 and grad.isnan().any((0, 1)).sum() == 1


def test_a_component_of_probability_zero():
    x, params = make()
    params[:, 0] = -torch.inf
    own, plain = (run(x, params, impl) for impl in ("cpu", "reference"))
    torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-3)


def test_auto_and_what_goes_to_the_reference():
    x, params = make()
    fused = logistic_mixture_log_prob(x, params, num_mixtures=2, impl="cpu")
    assert torch.equal(logistic_mixture_log_prob(x, params, num_mixtures=2), fused)
    assert torch.equal(logistic_mixture_log_prob(x.double(), params, num_mixtures=2), fused)
    with use_impl("reference"):
        plain = logistic_mixture_log_prob(x, params, num_mixtures=2)
    assert torch.equal(plain, logistic_mixture_log_prob(x, params, num_mixtures=2, impl="reference"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logistic_mixture_log_prob(x, params, num_mixtures=2), fused)
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: it takes float32 or bfloat16, not float64"):
        logistic_mixture_log_prob(x.double(), params.double(), num_mixtures=2, impl="cpu")
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run: x requires a gradient, which only the reference gives"):
        logistic_mixture_log_prob(leaf, params, num_mixtures=2, impl="cpu")
    out = logistic_mixture_log_prob(leaf, params, num_mixtures=2)
    assert torch.autograd.grad(out.sum(), leaf)[0].ne(0).any()
    with pytest.raises(ValueError, match="x is on meta and params on cpu: move them to one device"):
        logistic_mixture_log_prob(x.to("meta"), params, num_mixtures=2)
