"""residual_normal's Triton kernels: values and gradients against float64, any strides, the C++ op."""

from __future__ import annotations

import pytest
import torch
from latents import SHAPES, same, small_programs
from norms import CL, needs_native

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

__all__ = ["small_programs"]
pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
PRIORS = ["none", "given", "residual"]
CASES = [(1e-3, FLOAT, "residual"), (30.0, FLOAT, "residual"), (1.0, HALF, "residual"), (1.0, BFLOAT, "residual")]
CASES += [(1.0, FLOAT, prior) for prior in PRIORS]


def inputs(shape, prior="residual", scale=1.0, dtype=FLOAT, seed=0):
    """(parameters, noise, gradients of z and of the sums); every type sees the same numbers."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(s, generator=g).bfloat16().float()  # noqa: E731
    parameters = [(scale * draw(*shape)).bfloat16().to(dtype) for _ in range(2 if prior == "none" else 4)]
    return parameters, torch.randn(shape, generator=g), [draw(*shape), *(draw(*shape[:2]) for _ in range(3))]


def run(parameters, noise, grads, prior="residual", impl="triton", used=range(4)):
    """The outputs, then the gradients of the parameters from the outputs in use."""
    leaves = [t.detach().requires_grad_() for t in parameters]
    out = F.residual_normal(*leaves, noise=noise, residual=prior == "residual", impl=impl)
    grads = [grads[i].to(out[i].dtype) for i in used]
    return [*(t.detach() for t in out), *torch.autograd.grad([out[i] for i in used], leaves, grads)]


def agrees(within_budget, shape, layout, prior="residual", scale=1.0, dtype=FLOAT):
    """Pooled over draws: of few elements, the plain op's largest error is now and then none at all."""
    found = []
    for kind, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "triton")):
        draws = []
        for seed in range(2):
            parameters, noise, grads = inputs(shape, prior, scale, dtype, seed)
            parameters = [t.to(kind, memory_format=layout) for t in parameters]
            draws.append(run(parameters, noise, grads, prior, impl))
        found.append([torch.stack(t) for t in zip(*draws, strict=True)])
    for exact, plain, got in zip(*found, strict=True):
        assert got.dtype == plain.dtype
        within_budget(got, plain, exact, dtype)


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("scale", "dtype", "prior"), CASES, ids=str)
def test_values_and_gradients(within_budget, scale, dtype, prior, layout):
    for shape in SHAPES[layout]:
        agrees(within_budget, shape, layout, prior, scale, dtype)


@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
def test_a_row_in_many_programs_and_steps(request, layout):
    cases = [inputs(shape) for shape in ((1, 2, 19, 11), (1, 20, 9, 8))]
    cases = [([t.contiguous(memory_format=layout) for t in parameters], *rest) for parameters, *rest in cases]
    whole = [run(*case) for case in cases]
    request.getfixturevalue("small_programs")
    for one, case in zip(whole, cases, strict=True):
        many = run(*case)
        assert same(one[:1] + one[4:], many[:1] + many[4:])
        assert not same(one[1:4], many[1:4])  # another order of adding
        for a, b in zip(one[1:4], many[1:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


LAYOUTS = {
    "channels-last": lambda t: t.contiguous(memory_format=CL),
    "a half of the channels": lambda t: torch.cat((t, t), 1)[:, t.shape[1] :],
    "a half of the channels, channels-last": lambda t: torch.cat((t, t), 1).contiguous(memory_format=CL)[:, : t.shape[1]],
    "a window of a larger map": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:, :, :1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_back(layout):
    arrange = LAYOUTS[layout]
    parameters, noise, grads = inputs((1, 2, 3, 5))
    for which in (range(4), [0]):  # the parameters; some of them; the noise and the gradient of z as well
        strided = [arrange(t) if i in which else t for i, t in enumerate(parameters)]
        others = [arrange(t) if 0 in which else t for t in (noise, grads[0])]
        dense = run([t.contiguous() for t in strided], others[0].contiguous(), [others[1].contiguous(), *grads[1:]])
        found = run(strided, others[0], [others[1], *grads[1:]])
        assert [t.stride() for t in found[4:]] == [torch.empty_like(t).stride() for t in strided]
        assert same(found[:1] + found[4:], dense[:1] + dense[4:])
        for a, b in zip(found[1:4], dense[1:4], strict=True):  # the order of a sum depends on the layout
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_gradients_of_sums_in_any_strides():
    parameters, noise, grads = inputs((1, 2, 3, 5))
    dense = run(parameters, noise, grads)
    assert same(dense, run(parameters, noise, [grads[0], *(t.t().contiguous().t() for t in grads[1:])]))
    one = [grads[0], *(t[:1, :1].expand_as(t) for t in grads[1:])]
    assert same(run(parameters, noise, one), run(parameters, noise, [t.contiguous() for t in one]))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (1, 3)], ids=str)
def test_absent_gradients(used):
    parameters, noise, grads = inputs((1, 2, 4, 5))
    zeros = [t if i in used else torch.zeros_like(t) for i, t in enumerate(grads)]
    found, full = run(parameters, noise, grads, used=used), run(parameters, noise, zeros)
    for a, b in zip(found, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_offsets_of_64_bits_and_reruns_give_the_same_bits(monkeypatch, small_programs):
    for layout in (torch.contiguous_format, CL):
        parameters, noise, grads = inputs((1, 5, 9, 5))
        parameters = [t.contiguous(memory_format=layout) for t in parameters]
        narrow = run(parameters, noise, grads)
        assert same(narrow, run(parameters, noise, grads))
        with monkeypatch.context() as m:
            m.setattr(_triton, "wide", lambda t: True)
            assert same(narrow, run(parameters, noise, grads))


def test_offsets_are_those_of_the_strides():
    assert not _triton.wide(torch.empty(1, device="meta").expand(2, 2**31))
    assert _triton.wide(torch.empty(2, 2**30, device="meta"))
    assert _triton.wide(torch.empty(2, 2**30, 2, device="meta")[..., 0]) and not _triton.wide(
        torch.empty(4, 2**28, device="meta")
    )


@needs_native
@pytest.mark.parametrize("prior", PRIORS)
def test_as_the_native_code(monkeypatch, prior):
    parameters, noise, grads = inputs((1, 3, 6, 7), prior)
    ours = run(parameters, noise, grads, prior)
    monkeypatch.undo()
    for a, b in zip(ours, run(parameters, noise, grads, prior, "cpu"), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-4)


def test_nan_stays_and_infinity_is_clamped():
    for where in range(5):
        parameters, noise, grads = inputs((1, 2, 3, 6))
        [*parameters, noise][where][0, 1, 2, 3] = torch.nan
        z, kl, log_q, log_p, *found = run(parameters, noise, grads)
        assert z[0, 1, 2, 3].isnan() and z.isnan().sum() == 1
        for log in (log_q, log_p):
            assert log[0, 1].isnan() and not log[0, 0].isnan()
        assert kl[0, 1].isnan() == (where < 4) and not kl[0, 0].isnan()
        assert all(t.isnan().sum() == t[0, 1, 2, 3].isnan() for t in found)
    parameters, noise, grads = inputs((1, 2, 3, 6))
    for t, value in zip(parameters, (torch.inf, -torch.inf, 1.0, 2.0), strict=True):
        t.fill_(value)
    z, *others = run(parameters, noise, grads)
    torch.testing.assert_close(z, 5.0 + (torch.exp(torch.tensor(-5.0)) + 0.01) * noise)
    assert all(t.isfinite().all() for t in others)


def test_slopes_of_saturated_inputs_keep_their_digits():
    """1 - (c / 5)^2 is 0 in float32 from an input of about 45 on."""
    mu = torch.full((1, 1, 1, 1), 60.0, dtype=torch.float64)
    grads = [torch.ones(1, 1, 1, 1), *[torch.zeros(1, 1)] * 3]
    exact = run([mu, torch.zeros_like(mu)], torch.zeros(1, 1, 1, 1), grads, "none", "reference")[4]
    slope = 4 * torch.exp(-0.4 * mu)  # to 1e-10 of itself
    got = run([mu.float(), torch.zeros(1, 1, 1, 1)], torch.zeros(1, 1, 1, 1), grads, "none")[4]
    torch.testing.assert_close(got.double(), slope, rtol=1e-5, atol=0)
    assert (exact - slope).abs() < 1e-15


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    found = run(*inputs(shape))
    assert found[0].shape == shape and found[1].shape == shape[:2] and not any(t.any() for t in found)


def test_shapes_and_types_that_do_not_fit_are_refused():
    (a, b, c, d), noise, grads = inputs((2, 3, 4, 5))
    raw = torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="log_sigma_p has shape"):
        raw.residual_normal_fwd(a, b, c, d[:, :1], noise, True)
    with pytest.raises(RuntimeError, match="noise has shape .* torch.float16; expected"):
        raw.residual_normal_fwd(a, b, c, d, noise.half(), True)
    with pytest.raises(RuntimeError, match="both mu_p and log_sigma_p, or neither"):
        raw.residual_normal_fwd(a, b, c, None, noise, True)
    with pytest.raises(RuntimeError, match="dz has shape"):
        raw.residual_normal_bwd(grads[0][:, :1], *[None] * 5, a, b, c, d, noise, True, False)
    with pytest.raises(RuntimeError, match="dlog_q has shape"):
        raw.residual_normal_bwd(None, None, grads[1][:, :1], *[None] * 3, a, b, c, d, noise, True, False)
    with pytest.raises(RuntimeError, match="both dmu_p and dlog_sigma_p"):
        raw.residual_normal_bwd(*[None] * 4, c, None, a, b, c, d, noise, True, False)
