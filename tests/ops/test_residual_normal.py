from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from nvae_fast.kernels import _impl
from nvae_fast.kernels import residual_normal as rn
from nvae_fast.kernels.residual_normal import reference

NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
PRIORS = ["none", "given", "residual"]
SHAPE = (2, 3, 5, 7)


def inputs(shape=SHAPE, dtype=torch.float32, prior="residual", scale=1.0, seed=0):
    """(parameters, noise), the parameters exactly representable in bfloat16, so that every dtype sees the same numbers."""
    g = torch.Generator().manual_seed(seed)
    tensors = [(scale * torch.randn(shape, generator=g)).bfloat16().to(dtype) for _ in range(2 if prior == "none" else 4)]
    return tensors, torch.randn(shape, generator=g).to(torch.float64 if dtype == torch.float64 else torch.float32)


def weights(shape=SHAPE, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).bfloat16() for s in (shape, shape[:2], shape[:2], shape[:2])]


def run(tensors, noise, prior, impl, seed=1):
    """Outputs and gradients of a weighted sum of all outputs."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = rn.residual_normal(*leaves, noise=noise, residual=prior == "residual", impl=impl)
    ramps = [w.to(o.dtype) for w, o in zip(weights(out.z.shape, seed), out, strict=True)]
    return [*out, *torch.autograd.grad(out, leaves, ramps)]


@pytest.mark.parametrize("impl", IMPLS)
def test_matches_the_published_implementation(fixtures, impl):
    f = load_file(fixtures / "dists_and_schedules.safetensors")
    one, two = [f["normal/mu_raw"], f["normal/log_sigma_raw"]], [f["normal/mu2_raw"], f["normal/log_sigma2_raw"]]
    for a, b, kl in ((one, two, "kl_1_2"), (two, one, "kl_2_1")):
        out = rn.residual_normal(*a, *b, residual=False, impl=impl)
        torch.testing.assert_close(out.kl, f[f"normal/{kl}"].sum((2, 3)))
    mu, sigma = rn.normal_params(*one)
    noise = (f["normal/z"] - mu) / sigma
    torch.testing.assert_close(rn.residual_normal(*one, noise=noise, impl=impl).log_q, f["normal/log_p"].sum((2, 3)))


def test_elementwise_functions_match_the_published_implementation(fixtures):
    f = {k.removeprefix("normal/"): v for k, v in load_file(fixtures / "dists_and_schedules.safetensors").items()}
    mu, sigma = rn.normal_params(f["mu_raw"], f["log_sigma_raw"])
    mu2, sigma2 = rn.normal_params(f["mu2_raw"], f["log_sigma2_raw"])
    torch.testing.assert_close(mu, f["mu"])
    torch.testing.assert_close(sigma, f["sigma"])
    torch.testing.assert_close(rn.normal_params(f["mu_raw"], f["log_sigma_raw"], 0.7)[1], f["sigma_t07"])
    torch.testing.assert_close(reference.log_density(f["z"], mu, sigma), f["log_p"])
    torch.testing.assert_close(reference.kl_divergence(mu, sigma, mu2, sigma2), f["kl_1_2"])
    torch.testing.assert_close(rn.normal_log_prob(f["z"], f["mu_raw"], f["log_sigma_raw"]), f["log_p"].sum((2, 3)))


@pytest.mark.parametrize("prior", PRIORS)
def test_reference_differentiates_twice(prior):
    tensors, noise = inputs((1, 2, 1, 2), torch.float64, prior)
    leaves = [t.requires_grad_() for t in tensors]

    def f(*args):
        return tuple(rn.residual_normal(*args, noise=noise, residual=prior == "residual", impl="reference"))

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_against_torch_distributions():
    (mu_q, ls_q, mu_p, ls_p), noise = inputs(dtype=torch.float64)
    out = rn.residual_normal(mu_q, ls_q, mu_p, ls_p, noise)
    p, q = (torch.distributions.Normal(*rn.normal_params(*raw)) for raw in ((mu_p, ls_p), (mu_p + mu_q, ls_p + ls_q)))
    z = q.mean + q.stddev * noise
    torch.testing.assert_close(out.z, z)
    torch.testing.assert_close(out.kl, torch.distributions.kl_divergence(q, p).sum((2, 3)))
    torch.testing.assert_close(out.log_q, q.log_prob(z).sum((2, 3)))
    torch.testing.assert_close(out.log_p, p.log_prob(z).sum((2, 3)))


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_within_budget(within_budget, dtype, scale, prior, isa):
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(isa)
    try:
        for shape in (SHAPE, (1, 2, 1, 1), (2, 1, 33, 31)):
            exact = run(*inputs(shape, torch.float64, prior, scale), prior, "reference")
            plain = run(*inputs(shape, dtype, prior, scale), prior, "reference")
            for triple in zip(run(*inputs(shape, dtype, prior, scale), prior, "cpu"), plain, exact, strict=True):
                within_budget(*triple)
    finally:
        NATIVE.use_instruction_set(before)


@native
@pytest.mark.parametrize("used", [c for n in (1, 2) for c in itertools.combinations(range(4), n)], ids=str)
def test_absent_gradients(used):
    tensors, noise = inputs()
    found = []
    for impl in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = rn.residual_normal(*leaves, noise, impl=impl)
        found.append(torch.autograd.grad(sum(out[i].sum() for i in used), leaves, allow_unused=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


@native
def test_second_derivative_is_refused_with_the_cure():
    tensors, noise = inputs()
    leaves = [t.requires_grad_() for t in tensors]
    out = rn.residual_normal(*leaves, noise, impl="cpu")
    (first,) = torch.autograd.grad(out.kl.sum(), leaves[:1], create_graph=True)
    assert torch.isfinite(first).all()
    with pytest.raises(RuntimeError, match=r"residual_normal.*use impl='reference' to differentiate twice"):
        first.sum().backward()


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_a_graph_break(impl):
    tensors, noise = inputs()

    def f(*args):
        out = rn.residual_normal(*args, impl=impl)
        return out.z.sum() + (out.kl - out.log_q + 2 * out.log_p).sum()

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        leaves = [t.clone().requires_grad_() for t in tensors]
        found.append(torch.autograd.grad(g(*leaves, noise), leaves))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@native
def test_keeps_nothing_but_its_inputs():
    tensors, noise = inputs()
    leaves, kept = [t.requires_grad_() for t in tensors], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        rn.residual_normal(*leaves, noise, impl="cpu")
    assert set(kept) <= {t.data_ptr() for t in (*leaves, noise)}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape, impl):
    out = run(*inputs(shape), "residual", impl)
    assert out[0].shape == shape and out[1].shape == shape[:2]
    assert all(not o.isnan().any() for o in out)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_and_infinity_is_clamped(impl):
    for where in range(5):
        tensors, noise = inputs((1, 2, 3, 6))
        [*tensors, noise][where][0, 1, 2, 3] = torch.nan
        z, kl, log_q, log_p, *grads = run(tensors, noise, "residual", impl)
        assert z[0, 1, 2, 3].isnan() and z.isnan().sum() == 1
        for log in (log_q, log_p):
            assert log[0, 1].isnan() and not log[0, 0].isnan()
        assert kl[0, 1].isnan() == (where < 4) and not kl[0, 0].isnan()
    tensors, noise = inputs((1, 2, 3, 6))
    for t, value in zip(tensors, (torch.inf, -torch.inf, 1.0, 2.0), strict=True):
        t.fill_(value)
    out = rn.residual_normal(*tensors, noise, impl=impl)
    sigma = torch.exp(torch.tensor(-5.0)) + 0.01
    torch.testing.assert_close(out.z, 5.0 + sigma * noise)
    assert all(o.isfinite().all() for o in out)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_seed_is_one_sample(impl):
    tensors, noise = inputs()
    exact = rn.residual_normal(*tensors, generator=torch.Generator().manual_seed(3), impl="reference").z
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        generator = torch.Generator().manual_seed(3)
        z = rn.residual_normal(*(t.to(dtype) for t in tensors), generator=generator, impl=impl).z
        assert z.dtype == dtype
        torch.testing.assert_close(z.float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    tensors, noise = inputs()
    plain = rn.residual_normal(*tensors, noise, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rn.residual_normal(*tensors, noise, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, mixed, strict=True))


def test_mixed_dtypes_are_promoted():
    tensors, noise = inputs()
    mixed = [tensors[0].bfloat16(), *tensors[1:]]
    assert torch.equal(rn.residual_normal(*mixed, noise).z, rn.residual_normal(*tensors, noise).z)


def test_float64_and_noise_with_gradient_go_to_the_reference():
    tensors, noise = inputs()
    noise.requires_grad_()
    z = rn.residual_normal(*tensors, noise).z
    assert torch.autograd.grad(z.sum(), noise)[0].gt(0).all()
    for args in ((*tensors, noise), [t.double() for t in tensors]):
        with pytest.raises(RuntimeError, match="residual_normal: impl='cpu' cannot run: "):
            rn.residual_normal(*args, impl="cpu")
    assert rn.residual_normal(*(t.double() for t in tensors)).kl.dtype == torch.float64


def test_normal_sample():
    (mu, log_sigma, *_), noise = inputs()
    mean, sigma = rn.normal_params(mu, log_sigma)
    torch.testing.assert_close(rn.normal_sample(mu, log_sigma, noise, temperature=0.7), mean + 0.7 * sigma * noise)
    assert torch.equal(rn.normal_sample(mu, log_sigma, noise, temperature=0.0), mean)
    with pytest.raises(ValueError, match="temperature is -1.0: expected a number >= 0"):
        rn.normal_sample(mu, log_sigma, temperature=-1.0)


BAD = {
    "log_sigma_q has shape": (ValueError, lambda m, n: (m, m[:, :, 1:])),
    "log_sigma_p is missing": (ValueError, lambda m, n: (m, m, m)),
    "mu_q has shape": (ValueError, lambda m, n: (m[0], m[0])),
    "noise has shape": (ValueError, lambda m, n: (m, m, None, None, n[:1])),
    "mu_q is torch.int64": (TypeError, lambda m, n: (m.long(), m)),
    "log_sigma_q is on meta": (ValueError, lambda m, n: (m, m.to("meta"))),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_get_one_line(message):
    kind, arguments = BAD[message]
    m, n = torch.randn(SHAPE), torch.randn(SHAPE)
    with pytest.raises(kind, match=message) as error:
        rn.residual_normal(*arguments(m, n))
    assert "\n" not in str(error.value)
