"""power_iteration's Triton kernels: sigma, vectors and gradients against float64, layouts, eps, NaN, refusals."""

from __future__ import annotations

import pytest
import torch
from power_iterations import LAYOUTS, SHAPES, make, run

from nvae_fast.kernels import _lists
from nvae_fast.kernels.power_iteration import power_iteration

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
LARGER = [
    (300, 4, 3, 3),
    *SHAPES[2:5],
    (1, 8, 3, 3),
    (96, 1, 5, 5),
    (7, 1),
    (17, 1100),
]  # beyond tiles, columns in fours or not


@pytest.mark.parametrize(("dtype", "iterations"), [(torch.float32, 0), (torch.float32, 3), (torch.bfloat16, 1)], ids=str)
def test_within_budget(within_budget, monkeypatch, dtype, iterations):
    from nvae_fast.kernels.power_iteration import triton

    monkeypatch.setattr(triton, "BLOCK", 64)  # less than the vectors
    weights, u, v = make(dtype, LARGER)
    exact = run(weights, [t.double() for t in u], [t.double() for t in v], "reference", iterations, torch.float64)
    reference, found = (run(weights, u, v, impl, iterations) for impl in ("reference", "triton"))
    for triple in zip(found, reference, exact, strict=True):
        within_budget(*triple)


@pytest.mark.parametrize("scale", [1e-4, 1e10])
def test_norms_below_eps_and_large_ones(scale):
    weights, u, v = make(shapes=SHAPES)
    weights = [scale * w for w in weights]
    for a, b in zip(run(weights, u, v, "triton"), run(weights, u, v, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_weights_give_the_same_and_keep_their_strides(layout):
    weights, u, v = make(torch.float16, [(4, 2, 3, 3), (8, 5, 1, 1), (9, 1, 5, 5), (4, 8, 3, 3)])
    strided = [LAYOUTS[layout](w) for w in weights]
    for iterations in (0, 2):  # columns in another order are other sums
        for a, b in zip(run(strided, u, v, "triton", iterations), run(weights, u, v, "triton", iterations), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 2e-3, atol=1e-5)
    leaves = [w.float().requires_grad_() for w in strided]
    grads = torch.autograd.grad(power_iteration(leaves, u, v, iterations=1, impl="triton")[0].sum(), leaves)
    assert [g.stride() for g in grads] == [torch.empty_like(w).stride() for w in leaves]


def test_vectors_in_any_form_wide_and_narrow_accesses_and_reruns_give_the_same_bits(monkeypatch):
    weights, u, v = make(shapes=[(20, 8, 3, 3), (6, 5)])
    expected = run(weights, u, v, "triton")
    kinds = [lambda t: t.double(), lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t.clone().requires_grad_(), lambda t: t]
    for kind in kinds:
        assert all(map(torch.equal, run(weights, [kind(t) for t in u], [kind(t) for t in v], "triton"), expected))
    monkeypatch.setattr(_lists, "aligned", lambda columns, *tensors: False)
    assert all(map(torch.equal, run(weights, u, v, "triton"), expected))
    one_by_one = [run([w], [a], [b], "triton")[1] for w, a, b in zip(weights, u, v, strict=True)]
    assert torch.equal(torch.cat(one_by_one), expected[1])


def test_what_is_given_stays_and_the_result_is_not_a_part_of_it():
    weights, u, v = make()
    before = [t.clone() for t in (*u, *v)]
    for iterations in (0, 1):
        _, new_u, new_v = power_iteration(weights, u, v, iterations=iterations, impl="triton")
        assert all(map(torch.equal, before, (*u, *v)))
        assert not {t.untyped_storage().data_ptr() for t in (*new_u, *new_v)} & {
            t.untyped_storage().data_ptr() for t in (*u, *v)
        }


def test_nan_stays_in_its_matrix():
    weights, u, v = make()
    weights[1][2, 3] = torch.nan
    sigma, new_u, new_v = power_iteration(weights, u, v, iterations=2, impl="triton")
    assert sigma[1].isnan() and new_u[1].isnan().all() and new_v[1].isnan().all()
    assert sigma.isnan().sum() == 1 and torch.cat([new_u[0], *new_u[2:]]).isfinite().all()


def test_a_matrix_of_zeros_is_finite():
    weight = torch.zeros(3, 4, requires_grad=True)
    sigma, (u,), (v,) = power_iteration([weight], [torch.ones(3)], [torch.ones(4)], iterations=2, impl="triton")
    sigma.sum().backward()
    assert sigma == 0 and not u.any() and not v.any() and not weight.grad.any()


def test_wrong_arguments():
    raw, one = torch.ops.nvae_fast, torch.ones
    for call, message in (
        (
            lambda: raw.power_iteration_fwd([one(2, 3)], [one(3)], [one(3)], 1, 1e-3),
            r"u\[0\], v\[0\] have 3 values .*expected 2",
        ),
        (lambda: raw.power_iteration_fwd([one(2, 3)], [one(2)] * 2, [one(3)], 1, 1e-3), "1 weights, 2 u, 1 v: expected one"),
        (
            lambda: raw.power_iteration_bwd(one(1), one(2), one(4), [2, 2, 3, 3, 1]),
            "2 of u, 4 of v: expected those of the layouts",
        ),
    ):
        with pytest.raises(RuntimeError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
