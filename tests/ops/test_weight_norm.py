"""weight_norm: the fixtures, a plain formula, the C++ implementation against both, layouts, norm 0, bad arguments."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels import _impl
from nvae_fast.kernels.flow_cell import autoregressive_mask
from nvae_fast.kernels.weight_norm import weight_norm

FIXTURES = Path(__file__).parents[1] / "data" / "nvae_reference"
NATIVE = _impl.load_native()[0]
native = pytest.mark.skipif(NATIVE is None, reason="built without the native extension")
IMPLS = ["reference", pytest.param("cpu", marks=native)]
SETS = [s for s in (NATIVE.build_info()["instruction_sets"] if NATIVE else []) if NATIVE.use_instruction_set(s)]
SHAPES = [(4, 3, 3, 3), (5, 2), (6, 1, 5, 5), (3, 4, 1)]
LARGE = [(7, 33, 3, 3), (2, 1200), (65, 1, 1, 1)]


def make(dtype=torch.float32, shapes=SHAPES):
    """Weights, log_norms and masks (none, float, bool, none, ...); values are those of float32 in every dtype."""
    g = torch.Generator().manual_seed(2)
    weights = [torch.randn(s, generator=g).to(dtype) for s in shapes]
    norms = [torch.randn((s[0],) + (1,) * (len(s) - 1), generator=g).to(dtype) for s in shapes]
    masks = [None if i % 4 in (0, 3) else torch.rand(s, generator=g) < 0.6 for i, s in enumerate(shapes)]
    masks[1] = masks[1].float()
    return weights, norms, masks


def incoming(weights, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=g).to(w.dtype) for w in weights]


def run(weights, norms, masks, impl, grads=None):
    """Effective weights, then the gradients of all weights and log_norms."""
    leaves = [t.detach().requires_grad_() for t in (*weights, *norms)]
    out = weight_norm(leaves[: len(weights)], leaves[len(weights) :], masks, impl=impl)
    return [*out, *torch.autograd.grad(out, leaves, grads or incoming(weights))]


def plain(w, norm, mask, eps=1e-5):
    w = w if mask is None else w * mask
    length = torch.linalg.vector_norm(w, dim=list(range(1, w.dim())), keepdim=True)
    return norm.exp() * w / (length + eps)


@pytest.fixture(scope="module")
def blocks():
    return load_file(FIXTURES / "blocks.safetensors")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["conv2d", "arconv"])
def test_fixture_of_fresh_convolutions(blocks, name, impl):
    weight, norm, used = (blocks[f"fresh_init/{name}/{k}"] for k in ("weight", "log_weight_norm", "weight_used"))
    mask = autoregressive_mask(24, 4, 3, strict=True, mirror=False) if name == "arconv" else None
    (effective,) = weight_norm([weight], [norm], [mask], impl=impl)
    torch.testing.assert_close(effective, used, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
def test_fixture_of_a_convolution_with_gradients(blocks, impl):
    prefix = "conv2d_wn_bias"
    names = ("weight", "log_weight_norm", "bias")
    weight, norm, bias = (blocks[f"{prefix}/state/{n}"].clone().requires_grad_() for n in names)
    (effective,) = weight_norm([weight], [norm], impl=impl)
    y = torch.nn.functional.conv2d(blocks[f"{prefix}/in0"], effective, bias, padding=1)
    torch.testing.assert_close(y, blocks[f"{prefix}/out_train"], rtol=1e-5, atol=1e-5)
    (y.flatten() * torch.linspace(-1, 1, y.numel())).sum().backward()
    for name, parameter in zip(names, (weight, norm, bias), strict=True):
        torch.testing.assert_close(parameter.grad, blocks[f"{prefix}/grad/{name}"], rtol=1e-4, atol=1e-5)


def test_plain_formula():
    weights, norms, masks = make(torch.float64)
    expected = [plain(*item) for item in zip(weights, norms, masks, strict=True)]
    torch.testing.assert_close(weight_norm(weights, norms, masks), expected, rtol=1e-12, atol=1e-12)
    unmasked = [plain(w, n, None, eps=0.1) for w, n in zip(weights, norms, strict=True)]
    torch.testing.assert_close(weight_norm(weights, norms, eps=0.1), unmasked, rtol=1e-12, atol=1e-12)
    assert weight_norm([], []) == []


def test_gradients_of_first_and_second_order():
    weights, norms, masks = make(torch.float64)
    leaves = tuple(t.requires_grad_() for t in (*weights[1:3], *norms[1:3]))

    def f(w0, w1, n0, n1):
        return tuple(weight_norm([w0, w1], [n0, n1], masks[1:3]))

    assert gradcheck(f, leaves)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_norm(impl):
    weight = torch.randn(3, 2, 3, 3)
    weight[2] = 0
    mask = torch.ones_like(weight)
    mask[1] = 0
    weight.requires_grad_()
    norm = torch.zeros(3, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([weight], [norm], [mask], impl=impl)
    assert (effective[1:] == 0).all()
    dy = torch.randn_like(weight)
    dw, dl = torch.autograd.grad(effective, (weight, norm), dy, create_graph=True)
    assert dw.isfinite().all() and (dw[1] == 0).all() and (dl[1:] == 0).all()
    torch.testing.assert_close(dw[2], dy[2] / 1e-5)
    if impl == "reference":
        second = torch.autograd.grad(dw.sum() + dl.sum(), (weight, norm))
        assert all(t.isfinite().all() for t in second)


@native
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


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "output channel innermost": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "half of the rows": lambda t: torch.cat([t, t]).chunk(2)[1],
    "half of the columns": lambda t: torch.cat([t, t], 1).chunk(2, 1)[0],
}


@native
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


@native
def test_channels_last_weights_keep_their_layout():
    w = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    norm = torch.zeros(8, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([w], [norm], impl="cpu")
    (dw,) = torch.autograd.grad(effective, w, torch.randn(8, 6, 3, 3))
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (effective, dw))


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_weights_log_norms_and_gradients(impl):
    row, log_norm = torch.randn(1, 3, 1, 1, requires_grad=True), torch.randn(1, 1, 1, 1, requires_grad=True)
    (effective,) = weight_norm([row.expand(4, 3, 2, 2)], [log_norm.expand(4, 1, 1, 1)], impl=impl)
    (expected,) = [plain(row.expand(4, 3, 2, 2), log_norm, None)]
    torch.testing.assert_close(effective, expected, rtol=1e-6, atol=1e-6)
    dy = torch.tensor([1.0, -2.0, 0.5]).view(3, 1, 1).expand(4, 3, 2, 2)
    found, wanted = (torch.autograd.grad(y, (row, log_norm), dy) for y in (effective, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@native
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


@native
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


@native
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


@native
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


@native
def test_one_at_a_time_is_all_at_once():
    weights, norms, masks = make()
    together = weight_norm(weights, norms, masks, impl="cpu")
    for y, *item in zip(together, weights, norms, masks, strict=True):
        assert torch.equal(y, weight_norm(*([t] for t in item), impl="cpu")[0])


@native
def test_second_derivative_is_refused_with_the_cure():
    weights, norms, masks = make()
    leaves = [t.requires_grad_() for t in weights]
    out = weight_norm(weights, norms, masks, impl="cpu")
    first = torch.autograd.grad(sum(y.square().sum() for y in out), leaves, create_graph=True)
    assert all(t.isfinite().all() for t in first)
    with pytest.raises(RuntimeError, match=r"weight_norm.*use impl='reference' to differentiate twice"):
        first[0].sum().backward()


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_compiles_without_a_graph_break(impl):
    masks = make()[2]

    def f(weights, norms):
        out = weight_norm(weights, norms, masks, impl=impl)
        return sum((y * (i + y)).sum() for i, y in enumerate(out[:3]))

    torch._dynamo.reset()
    found = []
    for g in (torch.compile(f, fullgraph=True, backend="aot_eager"), f):
        weights, norms, _ = make()
        leaves = [t.requires_grad_() for t in (*weights, *norms)]
        found.append(torch.autograd.grad(g(weights, norms), leaves, materialize_grads=True))
    torch.testing.assert_close(*found)


@native
def test_keeps_nothing_but_its_inputs():
    weights, norms, masks = make()
    masks = [None if m is None else m.float() for m in masks]
    leaves, kept = [t.requires_grad_() for t in (*weights, *norms)], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        weight_norm(weights, norms, masks, impl="cpu")
    assert set(kept) <= {t.data_ptr() for t in (*leaves, *masks) if t is not None}


@native
def test_results_share_no_memory():
    weights, norms, masks = make()
    found = [*run(weights, norms, masks, "cpu"), *weights, *norms]
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_weights(impl):
    shapes = [(0, 3, 3, 3), (2, 0), (3, 2)]
    weights, norms, _ = make(shapes=shapes)
    found = run(weights, norms, None, impl)
    assert [t.shape for t in found] == [t.shape for t in (*weights, *weights, *norms)]
    assert all(t.isfinite().all() for t in found) and (found[-2] == 0).all()
    assert weight_norm([], [], impl=impl) == []


@native
def test_other_dtypes_go_to_the_reference():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        weights, norms, masks = make(dtype)
        with pytest.raises(RuntimeError, match=f"weight_norm: impl='cpu' cannot run: .*not {str(dtype)[6:]}"):
            weight_norm(weights, norms, masks, impl="cpu")
        assert all(y.dtype == dtype for y in weight_norm(weights, norms, masks))


def test_bfloat16():
    weights, norms, masks = make(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = weight_norm(weights, norms, masks)
    for y, w, norm, mask in zip(results, weights, norms, masks, strict=True):
        assert y.dtype == torch.bfloat16
        exact = plain(w.double(), norm.double(), mask)
        error = (plain(w, norm, None if mask is None else mask.bfloat16()).double() - exact).abs().max()
        assert (y.double() - exact).abs().max() <= 2 * (error + torch.finfo(y.dtype).eps * exact.abs().max())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2, 3)], []), "1 weights, 0 log_norms, no masks"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], []), "1 weights, 1 log_norms, 0 masks"),
        (([torch.zeros(3)], [torch.zeros(3)]), r"weights\[0\] of shape \(3,\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2)]), r"log_norms\[0\] of shape \(2,\): expected \(2, 1\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.zeros(3)]), r"masks\[0\] of shape \(3,\)"),
        (([torch.zeros(2, 3)], [torch.zeros(2, 1)], [torch.ones(2, 3, requires_grad=True)]), r"masks\[0\] requires a grad"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        weight_norm(*arguments)
    assert "\n" not in str(caught.value)
