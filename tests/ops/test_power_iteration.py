"""power_iteration against a plain loop and the exact norm, its gradient, precisions, layouts, bad arguments."""

from __future__ import annotations

import pytest
import torch
from power_iterations import IMPLS, LARGER, LAYOUTS, NATIVE, SETS, SHAPES, make, native, run
from torch.autograd import gradcheck

from nvae_fast.kernels.power_iteration import ops, power_iteration


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


@pytest.mark.parametrize("impl", IMPLS)
def test_converges_to_the_spectral_norm(impl):
    weights, u, v = make()
    sigma, *_ = power_iteration(weights, u, v, iterations=400, impl=impl)
    expected = torch.stack([torch.linalg.matrix_norm(w.flatten(1), 2) for w in weights])
    torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_the_outer_product(impl):
    weights, u, v = make()
    leaves = [w.requires_grad_() for w in weights]
    coefficients = torch.arange(1.0, len(weights) + 1)
    sigma, new_u, new_v = power_iteration(leaves, u, v, iterations=3, impl=impl)
    assert not any(t.requires_grad for t in (*new_u, *new_v))
    for c, w, left, right, grad in zip(
        coefficients, weights, new_u, new_v, torch.autograd.grad(sigma @ coefficients, leaves), strict=True
    ):
        torch.testing.assert_close(grad, c * torch.outer(left, right).view(w.shape))


def test_gradcheck():
    weights, u, v = make(torch.float64, SHAPES[:4])
    # Fixed u and v: with iterations a numerical derivative would see them move.
    assert gradcheck(lambda *w: power_iteration(w, u, v, iterations=0)[0], tuple(w.requires_grad_() for w in weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_weights(layout, impl, dtype):
    weights, u, v = make(dtype, [(4, 2, 3, 3), (8, 5, 1, 1), (9, 1, 5, 5), (4, 2, 3, 3)])
    strided = [LAYOUTS[layout](w) for w in weights]
    for a, b in zip(run(strided, u, v, impl), run(weights, u, v, impl), strict=True):
        assert torch.equal(a, b)


@native
def test_gradients_have_the_strides_of_a_dense_weight():
    weights, u, v = make(shapes=[(4, 2, 3, 3), (8, 5, 1, 1)])
    for arrange in (torch.Tensor.contiguous, LAYOUTS["channels_last"], LAYOUTS["transposed"]):
        leaves = [arrange(w).requires_grad_() for w in weights]
        grads = torch.autograd.grad(power_iteration(leaves, u, v, iterations=1, impl="cpu")[0].sum(), leaves)
        assert [g.stride() for g in grads] == [w.stride() for w in leaves]


@native
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("iterations", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_within_budget(within_budget, dtype, iterations, isa):
    weights, u, v = make(dtype, LARGER)
    exact = run(weights, [t.double() for t in u], [t.double() for t in v], "reference", iterations, torch.float64)
    reference = run(weights, u, v, "reference", iterations)
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(isa)
    try:
        found = run(weights, u, v, "cpu", iterations)
    finally:
        NATIVE.use_instruction_set(before)
    for triple in zip(found, reference, exact, strict=True):
        within_budget(*triple)


@native
@pytest.mark.parametrize("scale", [1e-4, 1e10])
def test_norms_below_eps_and_large_ones(scale):
    weights, u, v = make(shapes=LARGER)
    weights = [scale * w for w in weights]
    for a, b in zip(run(weights, u, v, "cpu"), run(weights, u, v, "reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_stays_in_its_matrix(impl):
    weights, u, v = make()
    weights[1][2, 3] = torch.nan
    sigma, new_u, new_v = power_iteration(weights, u, v, iterations=2, impl=impl)
    assert sigma[1].isnan() and new_u[1].isnan().all() and new_v[1].isnan().all()
    assert sigma.isnan().sum() == 1 and torch.cat(new_u[2:]).isfinite().all()


@native
def test_thread_count_does_not_change_a_bit():
    weights, u, v = make(shapes=[*LARGER, (128, 144), (150, 32, 3, 3)])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(weights, u, v, "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@native
def test_start_vectors_of_other_kinds():
    weights, u, v = make()
    kinds = [lambda t: t.double(), lambda t: torch.stack([t, t], 1)[:, 0], lambda t: t.clone().requires_grad_()]
    expected = power_iteration(weights, u, v, iterations=2, impl="cpu")
    for kind in kinds:
        found = power_iteration(weights, [kind(t) for t in u], [kind(t) for t in v], iterations=2, impl="cpu")
        assert torch.equal(found[0], expected[0]) and not any(t.requires_grad for t in found[1])


@native
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_opcheck(layout):
    weights, u, v = make(shapes=[(4, 2, 3, 3), (8, 5, 1, 1), (3, 1, 5, 5)])
    weights = [LAYOUTS.get(layout, torch.Tensor.contiguous)(w) for w in weights]
    layouts = [n for w in weights for n in (w.dim(), *w.shape, *w.stride())]
    torch.library.opcheck(torch.ops.nvae_fast.power_iteration_fwd, (weights, u, v, 2, 1e-3))
    args = (torch.ones(1).expand(3), torch.cat(u), torch.cat(v), layouts)
    torch.library.opcheck(torch.ops.nvae_fast.power_iteration_bwd, args)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
@pytest.mark.parametrize("inside", [False, True])  # whether the vectors are made by what is compiled
def test_compiles_without_a_graph_break(impl, inside):
    weights, u, v = make()

    def f(*args):
        left, right = ([t * 1.0 for t in ts] if inside else ts for ts in (u, v))
        sigma, new_u, new_v = power_iteration(args, left, right, iterations=2, impl=impl)
        return sigma.sum(), [*new_u, *new_v]

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        leaves = [w.clone().requires_grad_() for w in weights]
        loss, vectors = g(*leaves)
        found.append([loss, *vectors, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@native
def test_keeps_nothing_but_the_new_vectors():
    weights, u, v = make()
    leaves, kept = [w.requires_grad_() for w in weights], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda t: t):
        power_iteration(leaves, u, v, iterations=2, impl="cpu")
    assert kept == [sum(map(len, u)), sum(map(len, v))]


@native
def test_second_derivative_is_refused_with_the_cure():
    weights, u, v = make()
    leaves = [w.requires_grad_() for w in weights]
    sigma, *_ = power_iteration(leaves, u, v, iterations=2, impl="cpu")
    first = torch.autograd.grad((sigma**2).sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"power_iteration.*use impl='reference' to differentiate twice"):
        first[0].sum().backward()


@native
def test_float64_goes_to_the_reference():
    weights, u, v = make(torch.float64)
    with pytest.raises(RuntimeError, match="power_iteration: impl='cpu' cannot run: it takes float32 or bfloat16"):
        power_iteration(weights, u, v, iterations=1, impl="cpu")
    assert power_iteration(weights, u, v, iterations=1)[0].dtype == torch.float64
    assert ops.cpu_can_run([weights[0].float()]) is None


@pytest.mark.parametrize("impl", IMPLS)
def test_low_precision_weights_are_computed_in_float32(impl):
    weights, u, v = make(torch.bfloat16)
    wide = [w.float() for w in weights]
    expected = power_iteration(wide, u, v, iterations=4, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sigma, new_u, _ = power_iteration(weights, u, v, iterations=4, impl=impl)
    assert sigma.dtype == torch.float32 and torch.equal(sigma, expected[0]) and torch.equal(new_u[2], expected[1][2])
    # bfloat16 weights: the error of the plain loop in that dtype bounds ours by far.
    exact, *_ = power_iteration([w.double() for w in weights], u, v, iterations=4)
    low = torch.stack([plain(w, a.bfloat16(), b.bfloat16(), 4)[0] for w, a, b in zip(weights, u, v, strict=True)])
    budget = 2 * ((low.double() - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max())
    assert (sigma.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_matrix_is_finite(impl):
    weight = torch.zeros(3, 4, requires_grad=True)
    sigma, (u,), (v,) = power_iteration([weight], [torch.ones(3)], [torch.ones(4)], iterations=2, impl=impl)
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
        ({"v": [torch.zeros(3), torch.zeros(3, device="meta")]}, r"v\[1\] is on meta: expected cpu, where weights\[0\] is"),
    ],
)
def test_bad_arguments(change, message):
    good = {"weights": [torch.zeros(2, 3)] * 2, "u": [torch.zeros(2)] * 2, "v": [torch.zeros(3)] * 2, "iterations": 1}
    with pytest.raises(ValueError, match=message) as caught:
        power_iteration(**(good | change))
    assert "\n" not in str(caught.value)
