"""conv2d's own kernels: a 3x3 convolution behind a normalisation and an activation, statistics of y, and both gradients."""

from __future__ import annotations

import pytest
import torch
from followings import check_followed
from norms import CL, check_stats, image, tensor
from torch import Tensor
from torch.nn import functional as tf

from nvae_fast.kernels import _triton

pytest.importorskip("triton")
from nvae_fast.kernels.conv2d import _plan  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
RAW = torch.ops.nvae_fast
FLOAT, HALF = torch.float32, torch.float16
ACTS = (lambda u: u, tf.silu, tf.elu)
# N, C_in, C_out, H, W, dilation: tiles of 8x8 pixels and 32 channels: parts of one, several, tails
SHAPES = [(2, 20, 12, 8, 8, 1), (1, 5, 40, 8, 16, 2), (1, 33, 17, 16, 8, 1)]
# whether a normalisation stands before, the activation, and the rows of c of the one behind
WAYS = {"norms": (True, 1, 3), "scaled": (True, 2, 2), "before": (True, 0, 0), "behind": (False, 1, 3), "none": (False, 0, 0)}
CASES = [(SHAPES[0], way, dtype) for way in WAYS for dtype in (FLOAT, HALF)]
CASES += [(shape, "norms", dtype) for shape in SHAPES[1:] for dtype in (FLOAT, HALF)]


def arguments(shape, way="norms", dtype=FLOAT):
    """(of the forward; of the backward)"""
    n, c_in, c_out, h, w, dilation = shape
    before, act, rows = WAYS[way]
    x, weight = image(n, c_in, h, w).to(dtype), tensor(c_out, c_in, 3, 3, scale=(9 * c_in + 1) ** -0.5).to(dtype)
    dy, y = (tensor(n, c_out, h, w, seed=seed).to(dtype) for seed in (1, 2))
    given = x, tensor(5, c_in, seed=4) if before else None, act, weight, dilation
    return given, (dy, *((y, tensor(rows, c_out, seed=3)) if rows else (None, None)), *given)


def plain(args, dtype) -> tuple[Tensor, ...]:
    """y, du, dw and the first two rows of the table by torch, rounded as autocast rounds in 16 bits"""
    dy, y, c, x, bn, act, w, dilation = args
    wide = dtype if dtype == torch.float64 else FLOAT
    column = lambda t: t.to(wide)[:, None, None]  # noqa: E731
    g = dy.to(wide)
    if c is not None:
        g = (g if len(c) == 2 else g * column(c[0])) + y.to(wide) * column(c[-2]) + column(c[-1])
    u = x.to(wide) if bn is None else x.to(wide) * column(bn[3]) + column(bn[4])
    u, w = (t.detach().clone().requires_grad_() for t in (u, w.to(dtype)))
    out = tf.conv2d(ACTS[act](u).to(dtype), w, padding=dilation, dilation=dilation)
    out.backward(g.to(dtype))
    found = out.detach(), u.grad.to(dtype), w.grad
    if bn is None:
        return found
    return *found, torch.stack((u.grad.sum((0, 2, 3)), (u.grad * (x.to(wide) - column(bn[0]))).sum((0, 2, 3))))


def outcome(args, count=7.0) -> tuple[Tensor, ...]:
    """Of the kernels: y, its statistics, du, dw, the table"""
    return *RAW.conv2d_fwd(*args[3:], True)[:2], *RAW.conv2d_bwd(*args, count)


def check(args, dtype, within_budget) -> None:
    y, stats, du, dw, table = outcome(args)
    check_stats(stats, y)
    for ours, theirs, truth in zip((y, du, dw, table[:2]), plain(args, dtype), plain(args, torch.float64), strict=False):
        within_budget(ours, theirs, truth, dtype)
    assert table.shape == ((0 if args[4] is None else 7), args[3].shape[1])


@pytest.mark.parametrize(("shape", "way", "dtype"), CASES, ids=str)
def test_values_and_gradients(within_budget, shape, way, dtype):
    check(arguments(shape, way, dtype)[1], dtype, within_budget)


def test_many_tasks_of_a_weight_are_joined(within_budget):
    check(arguments((9, 3, 4, 8, 8, 1))[1], FLOAT, within_budget)  # nine, in two groups


@pytest.mark.parametrize("way", ["norms", "none"])
@pytest.mark.parametrize("size", [(1, 8, 16), (2, 8, 8)], ids=str)
def test_the_largest_tiles(monkeypatch, within_budget, size, way):
    """Of which there are enough in larger images: a patch 16 pixels across, or two patches, here of two images."""
    monkeypatch.setattr(_plan, "PROGRAMS", 1)
    check(arguments((size[0], 70, 40, *size[1:], 2), way, HALF)[1], HALF, within_budget)


def test_the_table_is_that_of_the_sums():
    table = outcome(arguments(SHAPES[0])[1])[-1]
    bn = arguments(SHAPES[0])[0][1]
    torch.testing.assert_close(table, RAW.bn_act_gradients(table[:2], bn, 7.0))


def same(a, b) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_any_strides_64_bit_offsets_and_reruns_give_the_same_bits(monkeypatch):
    args = arguments(SHAPES[2])[1]
    dense = outcome(args)
    assert all(t.is_contiguous(memory_format=CL) for t in (dense[0], dense[2]))
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if isinstance(t, Tensor) and t.dim() == 4 else t  # noqa: E731
    assert same(dense, outcome([sliced(t) for t in args]))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    planar = [t.contiguous() if isinstance(t, Tensor) else t for t in args]
    found = outcome(planar)
    assert same(dense, found) and found[3].stride() == planar[6].stride() != dense[3].stride() == args[6].stride()


def test_nan_stays_where_the_taps_carry_it():
    args = list(arguments((1, 5, 7, 8, 16, 2))[1])
    args[3] = args[3].clone()
    args[3][0, 2, 3, 15] = torch.nan  # at a border: the next row begins behind it
    y, _, du, dw, table = outcome(args)
    truth = plain(args, torch.float64)
    assert torch.equal(y.isnan(), truth[0].isnan()) and y.isnan().sum() == 7 * 6
    assert torch.equal(du.isnan(), truth[1].isnan()) and torch.equal(dw.isnan(), truth[2].isnan()) and dw.isnan().any()
    assert table[:2].isnan().nonzero().tolist() == [[0, 2], [1, 2]]
    args = list(arguments((1, 5, 7, 8, 16, 2))[1])
    args[0] = args[0].clone()
    args[0][0, 1, 0, 3] = torch.nan
    assert torch.equal(outcome(args)[2].isnan(), plain(args, torch.float64)[1].isnan())


@pytest.mark.parametrize("shape", [(0, 5, 4, 8, 8, 1), (2, 0, 5, 8, 8, 1), (2, 5, 0, 8, 8, 1)], ids=str)
@pytest.mark.parametrize("way", ["norms", "none"])
def test_nothing_to_sum_gives_zeros(shape, way):
    given, args = arguments(shape, way)
    for found, like in zip(outcome(args), (args[0], None, args[3], args[6], None), strict=True):
        assert not found.any() and (like is None or found.shape == like.shape)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5, 4, 8, 8, 1)], ids=str)
def test_the_normalisation_behind_is_finished_and_moves_once(shape):
    check_followed("conv2d_fwd", (*arguments(shape)[0], True, True), 1)


@pytest.mark.parametrize(
    ("size", "programs", "dtype"),
    [((2, 8, 8), 1, HALF), ((4, 8, 24), 1, HALF), ((1, 16, 24), 1000, FLOAT), ((3, 8, 8), 1000, HALF)],
    ids=str,
)
def test_means_over_the_pixels_of_each_image(monkeypatch, size, programs, dtype):
    """Two images in a tile, a tile and a half, several tiles, or one, with shares beside."""
    monkeypatch.setattr(_plan, "PROGRAMS", programs)
    given = arguments((size[0], 70, 5, *size[1:], 1), dtype=dtype)[0]
    y, stats, means = RAW.conv2d_fwd(*given, True, True)
    exact = y.double().mean((2, 3))
    assert means.dtype == FLOAT and (means - exact).abs().max() <= 2 * torch.finfo(FLOAT).eps * y.abs().max()
    assert torch.equal(means, RAW.conv2d_fwd(*given, False, True)[2])


def test_nan_stays_in_the_means_of_its_image():
    x, *given = arguments((4, 5, 7, 8, 8, 1), dtype=HALF)[0]
    x[1, 2, 3, 4] = torch.nan
    means = RAW.conv2d_fwd(x, *given, False, True)[2]
    assert means[1].isnan().all() and not means[[0, 2, 3]].isnan().any()


def test_one_launch_and_two(launches):
    given, args = arguments(SHAPES[0])
    with launches() as forward:
        RAW.conv2d_fwd(*given, True)
    with launches() as backward:
        RAW.conv2d_bwd(*args)
    assert forward == ["conv2d_fwd_kernel"] and backward == ["conv2d_du_kernel", "conv2d_dweight_kernel"]


def test_arguments_that_do_not_fit_are_refused():
    (x, bn, act, w, _), (dy, y, c, *_) = arguments(SHAPES[0])
    for call, said in (
        (lambda: RAW.conv2d_bwd(dy, y, None, x, bn, act, w, 1), "expected both y and c"),
        (lambda: RAW.conv2d_bwd(dy[:1], y, c, x, bn, act, w, 1), "dy has shape"),
        (lambda: RAW.conv2d_bwd(dy, y[:1], c, x, bn, act, w, 1), "y has shape"),
        (lambda: RAW.conv2d_bwd(dy, y, c[:1], x, bn, act, w, 1), "c has shape"),
        (lambda: RAW.conv2d_fwd(x, bn[:4], act, w, 1, True), "coefficients has shape"),
        (lambda: RAW.conv2d_fwd(x, bn, act, w[:, :8], 1, True), "weight has shape .* expected torch.float32 .C_out, 20, 3, 3."),
        (lambda: RAW.conv2d_fwd(x, bn, act, w, 3, True), "stride 1 whose padding is their dilation, 1 or 2"),
        (lambda: RAW.conv2d_fwd(x[..., :7], bn, act, w, 1, True), "sides are multiples of 8, not 8x7"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()
