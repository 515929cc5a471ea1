"""flow_cell's native implementation: values and every gradient against float64, layouts, threads, NaN, compile, refusals."""

from __future__ import annotations

import pytest
import torch
from flow_cells import WEIGHTS, make, make_flow, run, run_flow, same

from nvae_fast.kernels import _impl
from nvae_fast.kernels.flow_cell import flow_cell, flow_cells, reference

NATIVE = _impl.load_native()[0]
pytestmark = pytest.mark.skipif(NATIVE is None, reason="nvae_fast was installed without its native extension")
# B, Z, E, H, W: partial vectors of either kind, several panels of z channels, images below the kernels, tasks of several images
SHAPES = [
    (2, 20, 120, 16, 16), (3, 5, 30, 9, 7), (2, 3, 18, 1, 1), (67, 2, 12, 1, 1), (9, 4, 24, 4, 4), (1, 8, 48, 4, 5),
    (2, 33, 10, 5, 3), (1, 50, 20, 3, 17), (2, 1, 1, 2, 2), (1, 16, 32, 6, 33), (1, 7, 42, 1, 12), (2, 6, 36, 13, 1),
]  # fmt: skip


def check(args, dy, within_budget):
    exact = run([t.double() for t in args], dy.double(), "reference")
    got = run(args, dy, "cpu")
    for a, plain, truth, like in zip(got, run(args, dy, "reference"), exact, (args[0], *args), strict=True):
        assert a.dtype == like.dtype
        within_budget(a, plain, truth)
    return got


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_all_gradients(shape, kind, dtype, isa, within_budget):
    before = NATIVE.instruction_set()
    if not NATIVE.use_instruction_set(isa):
        pytest.skip(f"this CPU has no {isa}")
    try:
        check(*make(*shape, dtype=dtype, kind=kind), within_budget)
    finally:
        NATIVE.use_instruction_set(before)


def test_small_and_saturated_activations_keep_their_digits(within_budget):
    for scale in (1e-4, 30.0):
        args, dy = make(2, 6, 36, 7, 7, kind="dense")
        check([args[0] * scale, *args[1:]], dy, within_budget)


def test_dead_taps_have_their_gradients():
    args, dy = make(2, 4, 24, 6, 6, kind="masked")
    _, _, d_in, d_dw, _, _ = run(args, dy, "cpu")
    assert (d_in != 0).all() and (d_dw != 0).all()


def test_weights_and_input_of_different_types(within_budget):
    args, dy = make(2, 5, 30, 6, 6)
    check([args[0].bfloat16(), *args[1:]], dy.bfloat16(), within_budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_strides_give_the_same_bits_and_stay(dtype):
    args, dy = make(3, 6, 36, 7, 5, dtype=dtype)
    plain = run(args, dy, "cpu")
    wide = torch.zeros(3, 9, 9, 5, dtype=dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 2:8, 1:8] = args[0]
    layouts = {
        "channels_last": args[0].contiguous(memory_format=torch.channels_last),
        "slice": wide[:, 2:8, 1:8],
        "transposed": args[0].transpose(2, 3).contiguous().transpose(2, 3),
        "flipped batch": args[0].transpose(0, 1).contiguous().transpose(0, 1),
    }
    for name, z in layouts.items():
        got = run([z, *args[1:]], dy, "cpu")
        assert same(plain, got), name
        assert got[0].stride() == got[1].stride() == torch.empty_like(z).stride(), name
    for arrange in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t.mT.contiguous().mT):
        weights = [arrange(t) for t in args[1:4]]
        assert same(plain, run([args[0], *weights, args[4]], dy.contiguous(memory_format=torch.channels_last), "cpu"))
    for one in (torch.ones((), dtype=dtype).expand_as(dy), torch.randn(6, 1, 1).to(dtype).expand_as(dy)):
        assert same(run(args, one, "cpu"), run(args, one.contiguous(), "cpu"))


@pytest.mark.parametrize("shape", [(5, 20, 120, 8, 8), (21, 3, 18, 4, 4), (70, 1, 6, 1, 1)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(shape):
    before = torch.get_num_threads()
    args, dy = make(*shape)
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(run(args, dy, "cpu"))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


def test_an_empty_batch_has_zero_gradients():
    args, dy = make(0, 4, 24, 5, 5)
    y, dz, *gradients = run(args, dy, "cpu")
    assert y.shape == dz.shape == (0, 4, 5, 5)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, args[1:], strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_where_pytorch_has_them(value):
    args, _ = make(2, 5, 30, 9, 9, kind="dense")
    args[0][1, 2, 0, 4] = value
    got, expected = flow_cell(*args, impl="cpu"), reference.flow_cell(*args)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert got.isfinite().any() and not got.isfinite().all()


def test_nan_goes_nowhere_through_dead_taps():
    args, dy = make(1, 5, 30, 9, 9, kind="masked")
    moved = [args[0].clone(), *args[1:]]
    moved[0][0, 0, 4, 4] += 1
    depends = (reference.flow_cell(*args) != reference.flow_cell(*moved)).any(1)
    args[0][0, 0, 4, 4] = float("nan")
    y, *gradients = run(args, dy, "cpu")
    assert torch.equal(y.isnan().any(1), depends) and y.isnan().any() and not y.isnan().all()
    assert all(g.isnan().any() for g in gradients[:4]) and gradients[4].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_a_flow_has_the_bits_of_its_cells(dtype, layout):
    z, cells, dy = make_flow(3, 5, 30, 7, 6, dtype)
    z = z.contiguous(memory_format=layout)
    found = run_flow(z, cells, dy, "cpu")
    assert same(found, run_flow(z, cells, dy, "cpu", whole=False))
    assert found[0].stride() == found[1].stride() == z.stride()


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        z, cells, dy = make_flow(2, 3, 18, 5, 4, dtype, kinds=("masked", "mirrored"))
        weights = [w for cell in cells for w in cell]
        for first in (z, z.contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(torch.ops.nvae_fast.flow_cell_fwd.default, (first, weights))
            images = [first, z.contiguous(memory_format=torch.channels_last)]
            torch.library.opcheck(torch.ops.nvae_fast.flow_cell_bwd.default, (dy, images, weights))


def test_lists_that_do_not_fit_together():
    z, cells, dy = make_flow(2, 3, 18, 5, 4)
    with pytest.raises(RuntimeError, match="four weights a cell, not 3"):
        torch.ops.nvae_fast.flow_cell_fwd(z, cells[0][:3])
    with pytest.raises(RuntimeError, match="1 images and weights of 2 cells"):
        torch.ops.nvae_fast.flow_cell_bwd(dy, [z], cells[0] + cells[1])


def test_a_compiled_flow_gives_the_same_bits():
    z, cells, dy = make_flow(2, 4, 24, 6, 5)
    z, cells = z.requires_grad_(), [[w.requires_grad_() for w in cell] for cell in cells]
    y = torch.compile(flow_cells, fullgraph=True, backend="aot_eager")(z, *map(list, zip(*cells, strict=True)))
    gradients = torch.autograd.grad(y, [z, *(w for cell in cells for w in cell)], dy)
    assert same((y.detach(), *gradients), run_flow(z, cells, dy, "cpu"))


def test_compile_gives_the_same_bits():
    args, dy = make(2, 4, 24, 6, 5)
    compiled = torch.compile(flow_cell, fullgraph=True, backend="aot_eager")
    leaves = [t.requires_grad_() for t in args]
    y = compiled(*leaves)
    assert same((y.detach(), *torch.autograd.grad(y, leaves, dy)), run(args, dy, "cpu"))


def test_a_second_derivative_is_refused_in_one_line():
    args, _ = make(1, 3, 18, 4, 4)
    z = args[0].requires_grad_()
    (dz,) = torch.autograd.grad(flow_cell(z, *args[1:], impl="cpu").square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="impl='reference'") as caught:
        dz.sum().backward()
    assert "\n" not in str(caught.value)


def test_auto_and_what_the_native_code_does_not_take():
    args, dy = make(2, 4, 24, 6, 5)
    assert same(run(args, dy, "auto"), run(args, dy, "cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        assert same(run(args, dy, "auto"), run(args, dy, "cpu"))
    with _impl.use_impl("reference"):
        assert same(run(args, dy, "auto"), run(args, dy, "reference"))
    doubles = [t.double() for t in args]
    assert same(run(doubles, dy.double(), "auto"), run(doubles, dy.double(), "reference"))
    with pytest.raises(RuntimeError, match="float32 or bfloat16, not float64"):
        flow_cell(*doubles, impl="cpu")
