"""latent_group and normal_log_prob in Triton's kernels: values and gradients against float64, any strides, few launches."""

from __future__ import annotations

import pytest
import torch
from latents import SHAPES, same, small_programs
from norms import CL

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

__all__ = ["small_programs"]
pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
CASES = [
    (1e-3, FLOAT, True),
    (30.0, FLOAT, True),
    (1.0, HALF, True),
    (1.0, BFLOAT, True),
    (1.0, FLOAT, True),
    (1.0, FLOAT, False),
]


def drawn(shape, scale, dtype, seed, layout=torch.contiguous_format, count=3):
    """z, mu and log sigma; every type sees the same numbers."""
    g = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(shape, generator=g)).bfloat16().to(dtype, memory_format=layout) for _ in range(count)]


def density(tensors, grad, impl):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = F.normal_log_prob(*leaves, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize(("scale", "dtype", "prior"), CASES, ids=str)
def test_densities_and_their_gradients(within_budget, scale, dtype, prior, layout):
    for shape in SHAPES[layout]:
        found = []
        for kind, impl in ((torch.float64, "reference"), (dtype, "reference"), (dtype, "triton")):
            draws = []
            for seed in range(2):
                tensors = [t.to(kind) for t in drawn(shape, scale, dtype, seed, layout, 3 if prior else 1)]
                grad = torch.randn(shape[:2], generator=torch.Generator().manual_seed(seed))
                draws.append(density(tensors, grad, impl))
            found.append([torch.stack(t) for t in zip(*draws, strict=True)])
        for exact, plain, got in zip(*found, strict=True):
            within_budget(got, plain, exact, dtype)


def group(posterior, prior, noise, grads, impl, flow=lambda z: 1.5 * z + 0.25, residual=True, bias=None):
    """Outputs and gradients; the prior is used a second time, as a decoder might."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (posterior, prior, bias)]
    out = F.latent_group(*leaves[:2], noise, bias=leaves[2], flow=flow, residual=residual, impl=impl)
    leaves = [t for t in leaves if t is not None]
    weights = [g.to(t.dtype) for g, t in zip(grads, out, strict=True)]
    return [*(t.detach() for t in out), *torch.autograd.grad(out, leaves, weights)]


def inputs(shape=(2, 3, 5, 7), dtype=FLOAT, layout=CL, scale=1.0):
    b, z, h, w = shape
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(s, generator=g).bfloat16().float()  # noqa: E731
    both = [(scale * draw(b, 2 * z, h, w)).to(dtype, memory_format=layout) for _ in range(2)]
    return both, draw(*shape), [draw(*shape), draw(z, b).t(), draw(b, z), draw(b, z)]


def biases(channels):
    """With steps of 3, as those of a strided tensor are."""
    return (0.1 * torch.randn(6 * channels, generator=torch.Generator().manual_seed(7))).bfloat16().float()[::3]


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("flow", [None, lambda z: 1.5 * z + 0.25], ids=["no flow", "flow"])
@pytest.mark.parametrize("kind", ["top", "absolute", "residual", "residual, bias"])
def test_a_group_is_its_parts(within_budget, layout, flow, kind):
    (posterior, prior), noise, grads = inputs(layout=layout)
    prior, bias = None if kind == "top" else prior, biases(3) if "bias" in kind else None
    wide, how = [None if t is None else t.double() for t in (posterior, prior, noise, bias)], (flow, "residual" in kind)
    exact = group(*wide[:3], grads, "reference", *how, wide[3])
    plain = group(posterior, prior, noise, grads, "reference", *how, bias)
    for triple in zip(group(posterior, prior, noise, grads, "triton", *how, bias), plain, exact, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize(("layout", "shape"), [(torch.contiguous_format, (2, 2, 3, 23)), (CL, (2, 70, 1, 4))])
@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_a_bias_whose_sums_many_programs_make(within_budget, small_programs, dtype, layout, shape):
    """Of all images, channels in several blocks: in the budget, float32, the same bits again."""
    both, noise, grads = inputs(shape, dtype, layout, 0.3)  # v² has heavy tails: a single value would decide
    bias = biases(shape[1])
    exact = group(*(t.double() for t in both), noise.double(), grads, "reference", None, bias=bias.double())
    plain = group(*both, noise, grads, "reference", None, bias=bias)
    found = group(*both, noise, grads, "triton", None, bias=bias)
    for triple in zip(found, plain, exact, strict=True):
        within_budget(*triple, dtype)
    assert found[-1].dtype == FLOAT and same(found, group(*both, noise, grads, "triton", None, bias=bias))
    if dtype == FLOAT:
        added = both[0] + bias.view(1, -1, 1, 1)
        assert same(found[:-1], group(added, both[1], noise, grads, "triton", None))


@pytest.mark.parametrize(("layout", "shape"), [(torch.contiguous_format, (1, 2, 19, 11)), (CL, (1, 20, 9, 7))])
def test_a_row_in_many_programs_and_steps(request, layout, shape):
    (posterior, prior), noise, grads = inputs(shape, layout=layout)
    one = group(posterior, prior, noise, grads, "triton")
    request.getfixturevalue("small_programs")
    many = group(posterior, prior, noise, grads, "triton")
    assert same(many, group(posterior, prior, noise, grads, "triton"))
    assert same(one[:1] + one[4:], many[:1] + many[4:]) and not same(one[1:4], many[1:4])  # another order of adding
    for a, b in zip(one[1:4], many[1:4], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)


def test_a_group_is_four_launches(launches):
    """And none of torch's, neither for the halves nor for the sums of what reaches the bias, the prior and the moved z."""
    (posterior, prior), noise, grads = inputs()
    leaves = [t.requires_grad_() for t in (posterior, prior, biases(3).contiguous())]
    dz = grads[0].contiguous(memory_format=CL)
    with launches() as names:
        out = F.latent_group(*leaves[:2], noise, bias=leaves[2], flow=lambda z: z)
        torch.autograd.grad([out.z, out.kl], leaves, [dz, grads[1][:1, :1].expand_as(out.kl)])
    kernels = "fwd_kernel", "log_prob_fwd_kernel", "log_prob_bwd_kernel", "bwd_kernel"
    assert names == [f"residual_normal_{k}" for k in kernels]


def test_any_strides_of_densities():
    arrange = [
        lambda t: t.contiguous(memory_format=CL),
        lambda t: torch.cat((t, t), 1).contiguous(memory_format=CL)[:, : t.shape[1]],
        lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
        lambda t: t.mT.contiguous().mT,
        lambda t: t[:, :, :1].expand_as(t),
    ]
    tensors, grad = drawn((1, 3, 4, 5), 1.0, FLOAT, 0), torch.randn(3, 1).t()
    for f in arrange:
        for which in (range(3), [0], [2]):
            strided = [f(t) if i in which else t for i, t in enumerate(tensors)]
            found = density(strided, grad, "triton")
            dense = density([t.contiguous() for t in strided], grad.contiguous(), "triton")
            torch.testing.assert_close(found[0], dense[0], rtol=1e-6, atol=1e-5)
            assert same(found[1:], dense[1:])
            assert [t.stride() for t in found[1:]] == [torch.empty_like(t).stride() for t in strided]


def test_offsets_of_64_bits_give_the_same_bits(monkeypatch, small_programs):
    for layout in SHAPES:
        args = inputs((1, 5, 9, 5), layout=layout)
        narrow = group(*args[0], *args[1:], "triton")
        with monkeypatch.context() as m:
            m.setattr(_triton, "wide", lambda t: True)
            assert same(narrow, group(*args[0], *args[1:], "triton"))


def test_nan_and_infinity():
    for where in range(3):
        tensors = drawn((1, 2, 3, 6), 1.0, FLOAT, 0)
        tensors[where][0, 1, 2, 3] = torch.nan
        log_p, *found = density(tensors, torch.ones(1, 2), "triton")
        assert log_p[0, 1].isnan() and not log_p[0, 0].isnan()
        assert all(t.isnan().sum() == 1 and t[0, 1, 2, 3].isnan() for t in found)
    tensors = drawn((1, 2, 3, 6), 1.0, FLOAT, 0)
    tensors[0][0, 1, 2, 3] = torch.inf
    assert F.normal_log_prob(*tensors, impl="triton")[0, 1] == -torch.inf


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    both, noise, grads = inputs(shape)
    found = group(*both, noise, grads, "triton", bias=biases(shape[1]))
    assert (
        found[0].shape == shape
        and found[-1].shape == (2 * shape[1],)
        and found[1].shape == shape[:2]
        and not any(t.any() for t in found)
    )


def test_shapes_and_types_that_do_not_fit_are_refused():
    z, mu, log_sigma = drawn((2, 3, 4, 5), 1.0, FLOAT, 0)
    raw = torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="bias has shape"):
        raw.residual_normal_fwd(mu, log_sigma, None, None, z, True, torch.zeros(3))
    with pytest.raises(RuntimeError, match="bias has shape"):
        raw.residual_normal_bwd(*[None] * 6, mu, log_sigma, None, None, z, True, False, torch.zeros(6).half())
    with pytest.raises(RuntimeError, match="log_sigma has shape"):
        raw.normal_log_prob_fwd(z, mu, log_sigma[:, :1], None)
    with pytest.raises(RuntimeError, match="both mu and log_sigma, or neither"):
        raw.normal_log_prob_fwd(z, mu, None, None)
    with pytest.raises(RuntimeError, match="log_q has shape"):
        raw.normal_log_prob_fwd(z, mu, log_sigma, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="dkl has shape"):
        raw.normal_log_prob_bwd(None, torch.zeros(2, 4), None, z, mu, log_sigma, False)
    with pytest.raises(RuntimeError, match="dz has shape"):
        raw.normal_log_prob_bwd(None, None, z[:1], z, mu, log_sigma, False)


def test_a_posterior_and_a_prior_of_different_layouts():
    """The gradients of the one are half of a pair with gaps, in whose strides the other's are made first."""
    for layouts in ((CL, torch.contiguous_format), (torch.contiguous_format, CL)):
        (posterior, prior), noise, grads = inputs()
        dense = group(posterior, prior, noise, grads, "triton", bias=biases(3))
        mixed = [t.contiguous(memory_format=f) for t, f in zip((posterior, prior), layouts, strict=True)]
        for a, b in zip(group(*mixed, noise, grads, "triton", bias=biases(3)), dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
