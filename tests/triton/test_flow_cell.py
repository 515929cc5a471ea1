"""flow_cell's Triton kernels: values and every gradient against float64, layouts, tiles, NaN, dead taps, refusals."""

from __future__ import annotations

import pytest
import torch
from flow_cells import WEIGHTS, make, make_flow, run, run_flow, same

from nvae_fast.kernels import _triton
from nvae_fast.kernels.flow_cell import flow_cell, reference

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# B, Z, E, H, W: tails of tiles and images, a pixel, more channels than a block of k, fewer hidden channels than a tile
CASES = [((1, 3, 6, 5, 4), kind, FLOAT) for kind in WEIGHTS]
CASES += [((2, 5, 40, 3, 9), "masked", FLOAT), ((1, 12, 5, 2, 3), "mirrored", FLOAT), ((70, 1, 6, 1, 1), "dense", FLOAT)]
CASES += [((2, 2, 12, 2, 5), "masked", HALF), ((2, 2, 12, 2, 5), "dense", BFLOAT)]


def check(args, dy, within_budget):
    exact = run([t.double() for t in args], dy.double(), "reference")
    got = run(args, dy, "triton")
    for a, plain, truth in zip(got, run(args, dy, "reference"), exact, strict=True):
        within_budget(a, plain, truth, dy.dtype)


@pytest.mark.parametrize(("shape", "kind", "dtype"), CASES, ids=str)
def test_values_and_all_gradients(shape, kind, dtype, within_budget):
    check(*make(*shape, dtype=dtype, kind=kind), within_budget)


@pytest.mark.parametrize("scale", [1e-4, 30.0])
def test_small_and_saturated_activations_keep_their_digits(scale, within_budget):
    args, dy = make(1, 3, 18, 5, 5, kind="dense")
    check([args[0] * scale, *args[1:]], dy, within_budget)


@pytest.mark.parametrize("dtype", [HALF, BFLOAT], ids=str)
def test_float32_weights_and_an_input_of_16_bits(dtype, within_budget):
    args, dy = make(1, 3, 18, 5, 4)
    check([args[0].to(dtype), *args[1:]], dy.to(dtype), within_budget)


@pytest.mark.parametrize(("kind", "tasks"), [("masked", 2), ("mirrored", 3)])
def test_tiles_see_what_is_around_them_in_any_number_of_pieces_and_reruns(kind, tasks, monkeypatch, within_budget):
    from nvae_fast.kernels.flow_cell import triton

    args, dy = make(1, 2, 6, 7, 5, kind=kind)
    for name, value in dict(LEAST=4, MOST=(4, 4), TASKS=tasks, PIXELS=64).items():  # four tiles, one or two a program
        monkeypatch.setattr(triton, name, value)
    check(args, dy, within_budget)
    assert same(run(args, dy, "triton"), run(args, dy, "triton"))


def test_weights_are_joined_in_groups_of_tasks(monkeypatch, within_budget):
    """Three tiles, two and one, of each of two blocks of hidden channels."""
    from nvae_fast.kernels.flow_cell import triton

    args, dy = make(5, 1, 34, 1, 2)
    monkeypatch.setattr(triton, "LEAST", 2)
    monkeypatch.setattr(triton, "MOST", (2, 2))
    check(args, dy, within_budget)
    assert same(run(args, dy, "triton"), run(args, dy, "triton")) and not _triton.tickets(dy.device, 1).any()


def test_tiles_of_several_images(monkeypatch, within_budget):
    from nvae_fast.kernels.flow_cell import triton

    args, dy = make(5, 2, 12, 2, 3)
    monkeypatch.setattr(triton, "LEAST", 4)  # two images of 2 x 4 pixels
    check(args, dy, within_budget)


def test_the_gradient_of_w_in_is_laid_out_like_it():
    """So that weight_norm need not copy it."""
    args, dy = make(1, 2, 6, 2, 2)
    plain = run(args, dy, "triton")
    args[1] = args[1].contiguous(memory_format=torch.channels_last)
    got = run(args, dy, "triton")
    assert same(plain, got) and got[2].stride() == args[1].stride() != plain[2].stride() == (18, 9, 3, 1)


def test_a_flow_has_the_bits_of_its_cells(monkeypatch):
    """Two blocks of hidden channels and a task of two tiles: dz of a cell must be whole before the next cell reads it."""
    from nvae_fast.kernels.flow_cell import triton

    for name, value in dict(LEAST=4, MOST=(4, 4), TASKS=1).items():
        monkeypatch.setattr(triton, name, value)
    z, cells, dy = make_flow(1, 2, 34, 5, 3, HALF, kinds=("masked", "mirrored"))
    one_by_one = run_flow(z.contiguous(memory_format=torch.channels_last), cells, dy, "triton", whole=False)
    found = run_flow(z, cells, dy, "triton")
    assert same(found, one_by_one) and found[0].stride() == found[1].stride() == z.stride()
    assert not _triton.tickets(z.device, 1).any()


@pytest.mark.parametrize("count", [1, 3])
def test_launches_of_a_flow(launches, count):
    """Two for each cell: the gradients of the weights are whole when the cell's is."""
    z, cells, dy = make_flow(1, 2, 6, 2, 2)
    cells = [[w.contiguous(memory_format=torch.channels_last) if w.dim() == 4 else w for w in cell] for cell in cells[:count]]
    z, dy = (t.contiguous(memory_format=torch.channels_last) for t in (z, dy))
    with launches() as names:
        run_flow(z, cells, dy, "triton")
    kernels = ("flow_cell_fwd_kernel", count), ("flow_cell_bwd_kernel", count)
    assert names == [name for name, times in kernels for _ in range(times)]


def test_dead_taps_have_their_gradients():
    args, dy = make(1, 2, 12, 5, 5, kind="masked")
    _, _, d_in, d_dw, _, _ = run(args, dy, "triton")
    assert (d_in != 0).all() and (d_dw != 0).all()


def test_any_strides_and_64_bit_offsets_give_the_same_bits_and_strides_stay(monkeypatch):
    from nvae_fast.kernels.flow_cell import triton

    args, dy = make(2, 3, 6, 2, 3)
    plain = run(args, dy, "triton")
    wide = torch.zeros(2, 6, 4, 3).contiguous(memory_format=torch.channels_last)
    wide[:, 2:5, 1:3] = args[0]
    for z in (wide[:, 2:5, 1:3], args[0].contiguous(memory_format=torch.channels_last), args[0].mT.contiguous().mT):
        got = run([z, *args[1:]], dy, "triton")
        assert same(plain, got) and got[0].stride() == got[1].stride() == torch.empty_like(z).stride()
    weights = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in args[1:4]]
    bias = torch.stack([args[4], args[4]], 1)[:, 0]
    assert same(plain, run([args[0], *weights, bias], dy.contiguous(memory_format=torch.channels_last), "triton"))
    one = torch.ones(()).expand_as(dy)
    assert same(run(args, one, "triton"), run(args, one.contiguous(), "triton"))
    ordinary = triton._plan
    monkeypatch.setattr(
        triton, "_plan", lambda *t, **k: (p := ordinary(*t, **k))._replace(constants=p.constants | {"WIDE": True})
    )
    assert same(plain, run(args, dy, "triton"))


def test_an_empty_batch_has_zero_gradients():
    args, dy = make(0, 2, 12, 5, 5)
    y, dz, *gradients = run(args, dy, "triton")
    assert y.shape == dz.shape == (0, 2, 5, 5)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, args[1:], strict=True))
    z, cells, dy = make_flow(0, 2, 12, 5, 5)
    y, dz, *gradients = run_flow(z, cells, dy, "triton")
    assert y.shape == dz.shape == (0, 2, 5, 5) and len(gradients) == 12 and not any(g.any() for g in gradients)


def test_nan_and_infinity_stay_where_pytorch_has_them():
    for value in (float("nan"), float("inf")):
        args, _ = make(2, 3, 18, 7, 7, kind="dense")
        args[0][1, 2, 0, 4] = value
        got, expected = flow_cell(*args, impl="triton"), reference.flow_cell(*args)
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
        assert got.isfinite().any() and not got.isfinite().all()


def test_nan_goes_nowhere_through_dead_taps():
    args, dy = make(1, 3, 18, 7, 7, kind="masked")
    moved = [args[0].clone(), *args[1:]]
    moved[0][0, 0, 3, 3] += 1
    depends = (reference.flow_cell(*args) != reference.flow_cell(*moved)).any(1)
    args[0][0, 0, 3, 3] = float("nan")
    y, *gradients = run(args, dy, "triton")
    assert torch.equal(y.isnan().any(1), depends) and y.isnan().any() and not y.isnan().all()
    assert all(g.isnan().any() for g in gradients[:4]) and gradients[4].isfinite().all()


def test_wrong_arguments():
    args, dy = make(1, 2, 12, 3, 3)
    z, *cell = args
    small = [cell[0], cell[1][..., 1:4, 1:4], *cell[2:]]
    for weights, found in (
        (small, r"cell 0 has shape \(12, 1, 3, 3\)"),
        ([*cell, cell[0], cell[1].half()], "cell 1 .*float16"),
    ):
        with pytest.raises(RuntimeError, match=rf"w_dw of {found}.*expected \(12, 1, 5, 5\) of float32") as caught:
            torch.ops.nvae_fast.flow_cell_fwd(z, weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match=r"dy has shape \(1, 2, 3, 2\)"):
        torch.ops.nvae_fast.flow_cell_bwd(dy[..., 1:], [z], cell)
