"""power_iteration against a plain loop and the exact norm, its gradient, precisions, bad arguments."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from nvae_fast.kernels.power_iteration import power_iteration

# (4, 18) appears as three different weight shapes; the order mixes the stacks.
SHAPES = [(4, 2, 3, 3), (6, 5), (4, 18), (3, 1, 5, 5), (6, 5), (4, 18, 1, 1)]


def make(dtype=torch.float32, shapes=SHAPES):
    g = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    u, v = (
        [torch.nn.functional.normalize(torch.randn(n, generator=g, dtype=torch.float64), dim=0).to(wide) for n in sizes]
        for sizes in ([s[0] for s in shapes], [w[0].numel() for w in weights])
    )
    return weights, u, v


def plain(weight, u, v, iterations, eps=1e-3):
    matrix = weight.flatten(1)
    for _ in range(iterations):
        v = matrix.t() @ u
        v = v / max(v.norm().item(), eps)
        u = matrix @ v
        u = u / max(u.norm().item(), eps)
    return torch.dot(u, matrix @ v), u, v


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_plain_loop(iterations):
    weights, u, v = make(torch.float64)
    before = [t.clone() for t in (*u, *v)]
    sigma, new_u, new_v = power_iteration(weights, u, v, iterations=iterations)
    for i, weight in enumerate(weights):
        expected = plain(weight, u[i], v[i], iterations)
        torch.testing.assert_close((sigma[i], new_u[i], new_v[i]), expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, (*u, *v), strict=True))
    assert not {t.data_ptr() for t in (*new_u, *new_v)} & {t.data_ptr() for t in (*u, *v)}


def test_converges_to_the_spectral_norm():
    weights, u, v = make()
    sigma, *_ = power_iteration(weights, u, v, iterations=400)
    expected = torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights])
    torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)


def test_gradient_is_the_outer_product():
    weights, u, v = make()
    leaves = [w.requires_grad_() for w in weights]
    coefficients = torch.arange(1.0, len(weights) + 1)
    sigma, new_u, new_v = power_iteration(leaves, u, v, iterations=3)
    assert not any(t.requires_grad for t in (*new_u, *new_v))
    for c, w, left, right, grad in zip(
        coefficients, weights, new_u, new_v, torch.autograd.grad(sigma @ coefficients, leaves), strict=True
    ):
        torch.testing.assert_close(grad, c * torch.outer(left, right).view(w.shape))


def test_gradcheck():
    weights, u, v = make(torch.float64, SHAPES[:4])
    # Fixed u and v: with iterations a numerical derivative would see them move.
    assert gradcheck(lambda *w: power_iteration(w, u, v, iterations=0)[0], tuple(w.requires_grad_() for w in weights))


def test_strided_weights():
    weights, u, v = make(shapes=[(4, 2, 3, 3), (4, 2, 3, 3)])
    strided = [weights[0].to(memory_format=torch.channels_last), torch.stack(weights, dim=-1)[..., 1]]
    assert torch.equal(power_iteration(strided, u, v, iterations=2)[0], power_iteration(weights, u, v, iterations=2)[0])


def test_low_precision_weights_are_computed_in_float32():
    weights, u, v = make(torch.bfloat16)
    wide = [w.float() for w in weights]
    expected = power_iteration(wide, u, v, iterations=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sigma, new_u, _ = power_iteration(weights, u, v, iterations=4)
    assert sigma.dtype == torch.float32 and torch.equal(sigma, expected[0]) and torch.equal(new_u[2], expected[1][2])
    # bfloat16 weights: the error of the plain loop in that dtype bounds ours by far.
    exact, *_ = power_iteration([w.double() for w in weights], u, v, iterations=4)
    low = torch.stack([plain(w, a.bfloat16(), b.bfloat16(), 4)[0] for w, a, b in zip(weights, u, v, strict=True)])
    budget = 2 * ((low.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
    assert (sigma.double() - exact).abs().max() <= budget


def test_zero_matrix_is_finite():
    weight = torch.zeros(3, 4, requires_grad=True)
    sigma, (u,), (v,) = power_iteration([weight], [torch.ones(3)], [torch.ones(4)], iterations=2)
    sigma.sum().backward()
    assert sigma == 0 and u.isfinite().all() and v.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": [], "u": [], "v": []}, "weights is empty"),
        ({"u": [torch.zeros(2)]}, "2 weights, 1 u, 2 v"),
        ({"weights": [torch.zeros(2, 3), torch.zeros(3)]}, r"weights\[1\] of shape \(3,\)"),
        ({"u": [torch.zeros(2), torch.zeros(3)]}, r"u\[1\], v\[1\] of shapes \(3,\), \(3,\): expected \(2,\), \(3,\)"),
        ({"iterations": -1}, "iterations -1: expected 0 or more"),
    ],
)
def test_bad_arguments(change, message):
    good = {"weights": [torch.zeros(2, 3)] * 2, "u": [torch.zeros(2)] * 2, "v": [torch.zeros(3)] * 2, "iterations": 1}
    with pytest.raises(ValueError, match=message) as caught:
        power_iteration(**(good | change))
    assert "\n" not in str(caught.value)
