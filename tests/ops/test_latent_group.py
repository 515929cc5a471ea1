"""latent_group and normal_log_prob: against float64, in every layout, as parts of a graph."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _impl
from nvae_fast.kernels import residual_normal as rn

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
FLOWS = {"none": None, "flow": lambda z: 1.25 * z - 0.5}
LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda t: torch.cat([t, t], 1).chunk(2, 1)[1],
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


def draw(*shape, scale=1.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g)).bfloat16().to(dtype)


def densities(tensors, impl, arrange=lambda t: t):
    leaves = [t.detach().requires_grad_() for t in tensors]
    log_p = rn.normal_log_prob(*leaves, impl=impl)
    grad = arrange(draw(*log_p.shape, seed=9)).to(log_p.dtype)
    return [log_p.detach(), *torch.autograd.grad(log_p, leaves, grad)]


def group(posterior, prior, noise, impl, flow=None, residual=True, arrange=lambda t: t, bias=None):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (posterior, prior, bias)]
    out = rn.latent_group(*leaves[:2], noise, bias=leaves[2], flow=flow, residual=residual, impl=impl)
    leaves = [t for t in leaves if t is not None]
    grads = [arrange(draw(*t.shape, seed=i)).to(t.dtype) for i, t in enumerate(out)]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, grads)]


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_densities_within_budget(within_budget, dtype, scale, count, isa):
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(isa)
    try:
        for shape in ((2, 3, 5, 7), (2, 2, 33, 31)):
            tensors = [draw(*shape, scale=scale, dtype=dtype, seed=i) for i in range(count)]
            exact = densities([t.double() for t in tensors], "reference")
            for triple in zip(densities(tensors, "cpu"), densities(tensors, "reference"), exact, strict=True):
                within_budget(*triple)
    finally:
        NATIVE.use_instruction_set(before)


@native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 70, 17, 19)])
def test_densities_in_any_strides(layout, shape):
    tensors = [draw(*shape, seed=i) for i in range(3)]
    dense = densities(tensors, "cpu")
    for which in (range(3), [0], [1], [2]):
        strided = [LAYOUTS[layout](t) if i in which else t for i, t in enumerate(tensors)]
        found = densities(strided, "cpu", lambda g: g.t().contiguous().t())
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@native
@pytest.mark.parametrize("kind", ["top", "absolute", "residual", "top, bias", "residual, bias"])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_is_its_parts(within_budget, layout, flow, kind):
    how, found, top = (FLOWS[flow], "residual" in kind, lambda t: t), ([], [], []), "top" in kind
    for seed in (0, 10, 20):  # a single draw of the plain op's error says little
        tensors = [None if top and i else LAYOUTS[layout](draw(2, 6, 5, 7, seed=seed + i)) for i in range(2)]
        noise, bias = draw(2, 3, 5, 7, seed=seed + 2), draw(6, scale=0.1, seed=seed + 3) if "bias" in kind else None
        wide, dense = ([None if t is None else f(t) for t in tensors] for f in (torch.Tensor.double, torch.Tensor.contiguous))
        got = group(*tensors, noise, "cpu", *how, bias)
        assert all(map(torch.equal, got, group(*dense, noise, "cpu", *how, bias)))
        plain = group(*tensors, noise, "reference", *how, bias)
        exact = group(*wide, noise.double(), "reference", *how, None if bias is None else bias.double())
        for draws, outcome in zip(found, (got, plain, exact), strict=True):
            draws.append(outcome)
    for triple in zip(*([torch.stack(t) for t in zip(*draws, strict=True)] for draws in found), strict=True):
        within_budget(*triple)


def test_the_reference_of_a_group_is_that_of_its_parts():
    posterior, prior, noise = draw(2, 6, 4, 3), draw(2, 6, 4, 3, seed=1), draw(2, 3, 4, 3, seed=2)
    halves = *posterior.chunk(2, 1), *prior.chunk(2, 1)
    out, plain = rn.latent_group(posterior, prior, noise, flow=FLOWS["flow"]), rn.residual_normal(*halves, noise)
    assert torch.equal(out.z, FLOWS["flow"](plain.z)) and torch.equal(out.log_q, plain.log_q)
    torch.testing.assert_close(out.log_p, rn.normal_log_prob(out.z, *halves[2:]))
    torch.testing.assert_close(out.kl, out.log_q - out.log_p)
    top = rn.latent_group(posterior, None, noise, flow=FLOWS["flow"])
    torch.testing.assert_close(top.log_p, torch.distributions.Normal(0.0, 1.01).log_prob(top.z).sum((2, 3)))


@native
def test_nothing_is_kept_but_what_comes_in():
    posterior, prior, noise = (draw(2, 6, 4, 3).requires_grad_(), draw(2, 6, 4, 3, seed=1).requires_grad_(), draw(2, 3, 4, 3))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        out = rn.latent_group(posterior, prior, noise, flow=lambda z: z)
    assert set(kept) <= {t.data_ptr() for t in (posterior, prior, noise, out.z)}


@native
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", [True, False])
def test_opcheck(layout, given):
    z, *prior = (LAYOUTS[layout](draw(2, 3, 4, 5, seed=i)) for i in range(3))
    prior, sums = prior if given else [None, None], draw(2, 3)
    ops = torch.ops.nvae_fast
    torch.library.opcheck(ops.normal_log_prob_fwd, (z, *prior, None))
    torch.library.opcheck(ops.normal_log_prob_fwd, (z, *prior, sums))
    torch.library.opcheck(ops.normal_log_prob_bwd, (sums, None, None, z, *prior, False))
    torch.library.opcheck(ops.normal_log_prob_bwd, (None, sums, z, z, *prior, True))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("flow", FLOWS)
def test_compiles_without_a_graph_break(impl, flow):
    posterior, prior, noise = draw(2, 6, 4, 3), draw(2, 6, 4, 3, seed=1), draw(2, 3, 4, 3, seed=2)

    def f(posterior, prior):
        bias = posterior.mean((0, 2, 3))
        out = rn.latent_group(posterior, prior, noise, bias=bias, flow=FLOWS[flow], impl=impl)
        return out.z.sum() + (out.kl - 2 * out.log_p).sum()

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        leaves = [posterior.clone().requires_grad_(), prior.clone().requires_grad_()]
        found.append(torch.autograd.grad(g(*leaves), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@native
@pytest.mark.parametrize("count", [1, 2])
def test_compiles_without_a_gradient(count):
    posterior, noise = draw(2, 6, 4, 3), draw(2, 3, 4, 3, seed=2)
    prior = (draw(2, 6, 4, 3, seed=1),) * (count - 1)
    calls = (
        lambda: rn.latent_group(posterior, *prior, noise=noise, flow=lambda z: 2 * z, impl="cpu"),
        lambda: rn.residual_normal(*(posterior.chunk(2, 1) * count), noise=noise, impl="cpu"),
        lambda: [rn.normal_log_prob(noise, *(posterior.chunk(2, 1) * (count - 1)), impl="cpu")],
    )
    for f in calls:
        torch._dynamo.reset()
        for a, b in zip(torch.compile(f, fullgraph=True, backend="aot_eager")(), f(), strict=True):
            assert torch.equal(a, b)


@native
def test_second_derivative_is_refused_with_the_cure():
    leaves = [draw(1, 2, 3, 4, seed=i).requires_grad_() for i in range(3)]
    (first,) = torch.autograd.grad(rn.normal_log_prob(*leaves, impl="cpu").sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"normal_log_prob.*use impl='reference' to differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_and_infinity_is_far(impl):
    for where in range(3):
        tensors = [draw(1, 2, 3, 6, seed=i) for i in range(3)]
        tensors[where][0, 1, 2, 3] = torch.nan
        log_p = densities(tensors, impl)[0]
        assert log_p[0, 1].isnan() and not log_p[0, 0].isnan()
    tensors = [draw(1, 2, 3, 6, seed=i) for i in range(3)]
    tensors[0][0, 1, 2, 3] = torch.inf
    assert rn.normal_log_prob(*tensors, impl=impl)[0, 1] == -torch.inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape, impl):
    b, z, h, w = shape
    out = group(draw(b, 2 * z, h, w), draw(b, 2 * z, h, w), draw(*shape), impl, FLOWS["flow"], bias=draw(2 * z))
    assert not out[-1].any() and out[0].shape == shape and out[1].shape == shape[:2] and all(not t.isnan().any() for t in out)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_bias_is_as_one_in_the_posterior(within_budget, impl):
    """Of several blocks of pixels, in bfloat16, of a strided tensor; its gradient is float32, the sum of the posterior's."""
    given, bias = [draw(3, 10, 18, 19), draw(3, 10, 18, 19, seed=1), draw(3, 5, 18, 19, seed=2)], draw(20, seed=3)[::2]
    for dtype, far in ((torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        tensors = [t.to(dtype) for t in given[:2]] + given[2:]
        exact = group(*(t.double() for t in tensors), "reference", bias=bias.double())
        plain, got = (group(*tensors, which, bias=bias) for which in ("reference", impl))
        for triple in zip(got, plain, exact, strict=True):
            within_budget(*triple, dtype)
        assert got[-1].dtype == torch.float32
        torch.testing.assert_close(got[-1].double(), exact[4].sum((0, 2, 3)), rtol=1e-2, atol=far)
    added = group(given[0] + bias.view(1, -1, 1, 1), *given[1:], impl)
    assert all(map(torch.equal, added, group(*given, impl, bias=bias)))


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_and_autocast(impl):
    posterior, prior, noise = draw(2, 6, 4, 3), draw(2, 6, 4, 3, seed=1), draw(2, 3, 4, 3, seed=2)
    plain = rn.latent_group(posterior, prior, noise, flow=FLOWS["flow"], impl=impl)
    for mixed in ((posterior.bfloat16(), prior), (posterior, prior.bfloat16())):
        assert all(map(torch.equal, plain, rn.latent_group(*mixed, noise, flow=FLOWS["flow"], impl=impl)))
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, plain, rn.latent_group(posterior, prior, noise, flow=FLOWS["flow"], impl=impl)))
    low = rn.latent_group(posterior.bfloat16(), prior.bfloat16(), noise, flow=lambda z: z.float(), impl=impl)
    assert low.z.dtype == low.kl.dtype == torch.float32


BAD = {
    r"posterior has shape \(2, 5, 4, 3\): expected \[B, 2 Z, h, w\]": lambda t: rn.latent_group(t[:, :5]),
    r"prior has shape \(1, 6, 4, 3\): expected that of posterior": lambda t: rn.latent_group(t, t[:1]),
    r"noise has shape \(2, 6, 4, 3\)": lambda t: rn.latent_group(t, t, t),
    r"bias has shape \(3,\): expected \(6,\)": lambda t: rn.latent_group(t, bias=t[0, :3, 0, 0]),
    "bias is on meta: expected cpu, where posterior is": lambda t: rn.latent_group(t, bias=torch.zeros(6, device="meta")),
    "log_sigma is missing: give both": lambda t: rn.normal_log_prob(t, t),
    "mu has shape": lambda t: rn.normal_log_prob(t, t[:1], t),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_get_one_line(message):
    with pytest.raises(ValueError, match=message) as error:
        BAD[message](torch.zeros(2, 6, 4, 3))
    assert "\n" not in str(error.value)
