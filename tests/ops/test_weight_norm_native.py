"""The native weight_norm: the budget, layouts, what needs no gradient, threads, memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from weight_norms import LARGE, LAYOUTS, NATIVE, SETS, SHAPES, incoming, make, native, run

from nvae_fast.kernels.weight_norm import weight_norm

pytestmark = native


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shapes", [SHAPES, LARGE])
def test_native_within_budget(within_budget, shapes, size, isa):
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(isa)
    try:
        weights, norms, masks = make(shapes=shapes)
        weights = [size * w for w in weights]
        grads = incoming(weights)
        exact = [[t.double() for t in ts] for ts in (weights, norms, grads)]
        for triple in zip(
            run(weights, norms, masks, "cpu", grads),
            run(weights, norms, masks, "reference", grads),
            run(*exact[:2], masks, "reference", exact[2]),
            strict=True,
        ):
            within_budget(*triple)
    finally:
        NATIVE.use_instruction_set(before)


@pytest.mark.parametrize("arranged", ["weights", "norms", "masks", "grads", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, arranged):
    inputs = dict(zip(("weights", "norms", "masks"), make(shapes=SHAPES + LARGE), strict=True))
    inputs["grads"] = incoming(inputs["weights"])
    expected = run(**inputs, impl="cpu")
    for name in inputs if arranged == "all" else [arranged]:
        inputs[name] = [None if t is None else LAYOUTS[layout](t) for t in inputs[name]]
    found = run(**inputs, impl="cpu")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for effective, w in zip(found, inputs["weights"], strict=False):
        assert effective.stride() == torch.empty_like(w).stride()


def test_channels_last_weights_keep_their_layout():
    w = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = torch.zeros(8, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([w], [norm], impl="cpu")
    (dw,) = torch.autograd.grad(effective, w, torch.randn(8, 6, 3, 3))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (effective, dw))


@pytest.mark.parametrize("used", [c for n in (1, 2, 3) for c in itertools.combinations(range(4), n)], ids=str)
def test_unused_weights_get_no_gradient(used):
    found = []
    for impl in ("cpu", "reference"):
        weights, norms, masks = make()
        leaves = [t.requires_grad_() for t in (*weights, *norms)]
        out = weight_norm(weights, norms, masks, impl=impl)
        found.append(torch.autograd.grad([out[i].square().sum() for i in used], leaves, allow_unused=True))
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert (a is None) == (b is None) == (i % 4 not in used)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weights", "norms"])
def test_frozen_inputs(frozen):
    weights, norms, masks = make()
    expected = run(weights, norms, masks, "cpu")[4:]
    trained = norms if frozen == "weights" else weights
    for t in trained:
        t.requires_grad_()
    out = weight_norm(weights, norms, masks, impl="cpu")
    found = torch.autograd.grad(out, trained, incoming(weights))
    assert all(torch.equal(a, b) for a, b in zip(found, expected[4:] if frozen == "weights" else expected[:4], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "output channel innermost", "every second"])
def test_opcheck(layout):
    arrange = LAYOUTS.get(layout, torch.Tensor.contiguous)
    weights, norms, masks = make()
    weights = [arrange(w) for w in weights]
    masks = [None if m is None else arrange(m.float()) for m in masks]
    dy = incoming(weights)
    torch.library.opcheck(torch.ops.nvae_fast.weight_norm_fwd, (weights, norms, masks, 1e-5))
    for grads in (dy, [None, *dy[1:3], None]):
        torch.library.opcheck(torch.ops.nvae_fast.weight_norm_bwd, (grads, weights, norms, masks, 1e-5))


def test_thread_count_does_not_change_a_bit():
    shapes = [*SHAPES, (300, 61, 3, 3), (1, 50000), (0, 3), *LARGE, (40000, 1)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(run(*make(shapes=shapes), "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(t.isfinite().all() for t in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_one_at_a_time_is_all_at_once():
    weights, norms, masks = make()
    together = weight_norm(weights, norms, masks, impl="cpu")
    for y, *item in zip(together, weights, norms, masks, strict=True):
        assert torch.equal(y, weight_norm(*([t] for t in item), impl="cpu")[0])


def test_second_derivative_is_refused_with_the_cure():
    weights, norms, masks = make()
    leaves = [t.requires_grad_() for t in weights]
    out = weight_norm(weights, norms, masks, impl="cpu")
    first = torch.autograd.grad(sum(y.square().sum() for y in out), leaves, create_graph=True)
    assert all(t.isfinite().all() for t in first)
    with pytest.raises(RuntimeError, match=r"weight_norm.*use impl='reference' to differentiate twice"):
        first[0].sum().backward()


def test_keeps_nothing_but_its_inputs():
    weights, norms, masks = make()
    masks = [None if m is None else m.float() for m in masks]
    leaves, kept = [t.requires_grad_() for t in (*weights, *norms)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        weight_norm(weights, norms, masks, impl="cpu")
    assert set(kept) <= {t.data_ptr() for t in (*leaves, *masks) if t is not None}


def test_results_share_no_memory():
    weights, norms, masks = make()
    found = [*run(weights, norms, masks, "cpu"), *weights, *norms]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_other_dtypes_go_to_the_reference():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        weights, norms, masks = make(dtype)
        with pytest.raises(RuntimeError, match=f"weight_norm: impl='cpu' cannot run: .*not {str(dtype)[6:]}"):
            weight_norm(weights, norms, masks, impl="cpu")
        assert all(y.dtype == dtype for y in weight_norm(weights, norms, masks))
