"""se_residual's Triton kernels: values and gradients against float64, a normalisation on the way in, the C++ op."""

from __future__ import annotations

import pytest
import torch
from norms import CL, check_stats, image, needs_native, outcome, same, se, se_tensors, tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

pytest.importorskip("triton")
from nvae_fast.kernels.se_residual import triton as se_launchers  # noqa: E402

RAW = torch.ops.nvae_fast
pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# N, C, H, W, hidden: single pixels and channels, tails of pixels, channels and hidden units, several tiles of an image
SHAPES = [(1, 1, 5, 1, 1), (3, 7, 1, 1, 4), (2, 33, 5, 1, 5), (1, 192, 1, 5, 12)]
CASES = [(shape, True, dtype) for shape in SHAPES for dtype in (FLOAT, HALF)]
CASES += [(SHAPES[2], False, FLOAT), (SHAPES[2], False, HALF), (SHAPES[2], True, BFLOAT)]
CASES += [((1, 33, 20, 15, 4), True, FLOAT), ((2, 7, 20, 15, 4), True, HALF), ((1, 192, 5, 9, 12), True, FLOAT)]


@pytest.mark.parametrize(("shape", "gate", "dtype"), CASES, ids=str)
def test_values_and_gradients(check, shape, gate, dtype):
    tensors = se_tensors(*shape)
    check(lambda t, n, i: se(t, n, i, residual_scale=0.3), tensors if gate else tensors[:2], [], dtype, 2)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(2, 33, 5, 1, 5), (2, 7, 20, 15, 4)], ids=str)
def test_a_bias_of_x(check, shape, gate, dtype):
    tensors, bias = se_tensors(*shape), tensor(shape[1], shift=1.0, seed=3)
    check(lambda t, n, i: se(t, n, i, residual_scale=0.3), [*(tensors if gate else tensors[:2]), bias], [], dtype, 2)


def test_a_bias_costs_no_launch(launches):
    """Without a gate sum(dy) alone is taken for it."""
    tensors, bias, found = se_tensors(2, 33, 4, 4), tensor(33), {}
    for gate in (True, False):
        for biased in (True, False):
            leaves = [t.requires_grad_() for t in [*(tensors if gate else tensors[:2]), *([bias] if biased else [])]]
            with launches() as found[gate, biased]:
                y = se(leaves, [], "triton")
                torch.autograd.grad(y, leaves, tensors[0].detach())
    assert found[True, True] == found[True, False]
    assert len(found[False, True]) == len(found[False, False]) + 1 == 3


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("shape", [(2, 33, 4, 5, 7), (2, 7, 20, 15, 4)], ids=str)
def test_a_normalisation_on_the_way_in(within_budget, shape, gate):
    """bn is an affine map per channel. Rows 3 and 4 of its gradient are those of scale and bias, the others what they make."""
    channels, (skip, x, *gates) = shape[1], se_tensors(*shape)
    mean, scale, bias = tensor(channels, shift=1.0), tensor(channels, shift=1.0, seed=1), tensor(channels, seed=2)
    dy = tensor(*skip.shape, seed=5)

    def plain(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, scale, bias, *(gates if gate else []))]
        a, b = leaves[1][:, None, None], leaves[2][:, None, None]
        v = (leaves[0] - mean.to(dtype)[:, None, None]) * a + b
        y = F.se_residual(skip.to(dtype), v, *(leaves[3:] or [None] * 4), residual_scale=0.3, impl="reference")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    rstd = tensor(channels, seed=3).abs() + 0.5
    bn = torch.stack((mean, rstd**-2, rstd, scale, bias - mean * scale))
    w1, b1, w2, b2 = gates if gate else (None,) * 4
    y, state, stats = torch.ops.nvae_fast.se_residual_fwd(skip, x, bn, w1, b1, w2, b2, None, 0.3, True)
    dx, dbn, *dgates = torch.ops.nvae_fast.se_residual_bwd(dy, x, bn, w1, w2, state, 0.3)
    check_stats(stats, y)
    share = 1 / (x.numel() // channels)
    dweight, c1 = dbn[3].double() * rstd, -dbn[3].double() * scale * rstd.double() ** 2 * share
    made = torch.stack((dweight, c1, -scale * dbn[4].double() * share - c1 * mean))
    torch.testing.assert_close(dbn[:3].double(), made, rtol=1e-5, atol=1e-5 * made.abs().max().item())
    for got, ours, truth in zip([y, dx, dbn[3], dbn[4], *dgates], plain(torch.float32), plain(torch.float64), strict=True):
        within_budget(got, ours, truth)


@needs_native
@pytest.mark.parametrize("before", [(5, 33), (33,)], ids=["norm", "bias"])
@pytest.mark.parametrize("means", [True, False])
def test_both_schemas_as_in_the_native_code(monkeypatch, means, before):
    """The state as well, which the native backward could take over."""
    skip, x, *gate = se_tensors(2, 33, 6, 7, 5)
    bn, dy = tensor(*before), tensor(2, 33, 6, 7, seed=5)
    x_means = x.mean((2, 3)) if means else None
    found = []
    for _ in range(2):
        raw = torch.ops.nvae_fast
        y, state, stats = raw.se_residual_fwd(skip, x, bn, *gate, x_means, 0.3, True)
        found.append((y, state, stats, *raw.se_residual_bwd(dy, x, bn, gate[0], gate[2], state, 0.3)))
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize(("tiles", "kernels"), [(None, 1), (1, 1), (4, 1), (0, 2)], ids=["auto", "one", "several", "apart"])
def test_means_that_were_taken_before(launches, monkeypatch, tiles, kernels, dtype):
    """Every program finds the gate, of one tile or several, or a launch of its own does: the state and the numbers are those
    without means, the statistics those of y."""
    skip, x, *gate = se_tensors(2, 70, 16, 16, 20)
    skip, x, bn = skip.to(dtype), x.to(dtype), tensor(5, 70, seed=2)
    if tiles is not None:
        monkeypatch.setattr(se_launchers, "_chunk", lambda *sizes: tiles)
    taken = RAW.se_residual_fwd(skip, x, bn, *gate, None, 0.3, True)
    means = x.float().mean((2, 3))
    with launches() as names:
        given = RAW.se_residual_fwd(skip, x, bn, *gate, means, 0.3, True)
    assert len(names) == kernels
    check_stats(given[2], given[0])
    for a, b in zip(taken, given, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3 if dtype == HALF else 1e-5, atol=2e-3 if dtype == HALF else 1e-5)


def test_how_many_tiles_a_program_has():
    """A divisor of an image's, about 1,000 programs and 16 MB of weights at most; 0 where that cannot be."""
    chunk = se_launchers._chunk
    assert chunk(4, 128, 124 * 4) == 1 and chunk(16, 512, 124 * 4) == 8 and chunk(8, 384, 124 * 4) == 3
    assert chunk(60, 2, 1024 * 60) == 2 and chunk(75, 2, 1024 * 60) == 0 and chunk(2, 1031, 400) == 0


def test_any_strides_64_bit_offsets_and_reruns_give_the_same_bits(monkeypatch):
    tensors = se_tensors(2, 9, 8, 33)
    dense = outcome(se, tensors, [], "triton")
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if t.dim() == 4 else t  # noqa: E731
    same(dense, outcome(se, tensors, [], "triton", sliced, torch.Tensor.contiguous))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    same(dense, outcome(se, tensors, [], "triton"))
    assert dense["y0"].is_contiguous(memory_format=CL)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("shape", [(2, 33, 8, 8), (9, 66, 16, 8), (3, 20, 4, 4), (2, 7, 5, 3)], ids=str)
def test_statistics_of_the_output(launches, shape, dtype):
    """Taken with the sum where tiles divide an image: of one group of tasks, of several; else in a pass of their own."""
    skip, x, *gate = se_tensors(*shape)
    with launches() as names:
        y, stats = F.se_residual(skip.to(dtype), x.to(dtype), *gate, return_stats=True, impl="triton")
    check_stats(stats, y)
    assert torch.equal(y, F.se_residual(skip.to(dtype), x.to(dtype), *gate, impl="triton"))
    assert ("bn_act_stats_kernel" in names) == (shape[1] == 7)


def test_nan_stays_in_its_image():
    args = se_tensors(3, 9, 4, 3)
    args[1][1, 4, 2, 1] = torch.nan
    y = F.se_residual(*args, impl="triton")
    assert y[1].isnan().all() and y[0].isfinite().all() and y[2].isfinite().all()
    args[2:] = [None] * 4
    y = F.se_residual(*args, impl="triton")
    assert y[1, 4, 2, 1].isnan() and y.isnan().sum() == 1


def test_nan_reaches_the_gradients_that_it_reaches_in_torch():
    args = se_tensors(3, 9, 4, 3)
    args[1][1, 4, 2, 1] = torch.nan
    found, expected = (outcome(se, args, [], impl) for impl in ("triton", "reference"))
    for name, t in expected.items():
        assert torch.equal(found[name].isnan(), t.isnan()), name
    assert expected["d3"].isnan().any() and not expected["d1"].isnan().all()


def test_an_open_gate_keeps_the_digits_of_its_slope():
    """1 - gate of a gate that is rounded has lost those that say how far from 1 it is."""
    args = se_tensors(2, 33, 4, 5)
    args[5] = args[5] + 10.0
    exact, got = (
        outcome(se, [t.to(d) for t in args], [], i)["d5"] for d, i in ((torch.float64, "reference"), (torch.float32, "triton"))
    )
    assert (got - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_an_empty_batch():
    skip, x, *gate = (
        t.requires_grad_() for t in [torch.empty(0, 9, 4, 3), torch.empty(0, 9, 4, 3), *se_tensors(1, 9, 4, 3)[2:]]
    )
    y, stats = F.se_residual(skip, x, *gate, return_stats=True, impl="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape and not stats.any() and not any(t.grad.any() for t in gate)


def test_more_images_than_a_tile_of_the_weights_gradient(check):
    shape = (19, 3, 1, 2, 20)
    check(lambda t, n, i: se(t, n, i), se_tensors(*shape), [], FLOAT, 2)


def test_images_of_two_types_take_the_wider_one():
    skip, x, *gate = image(2, 9, 4, 3), *se_tensors(2, 9, 4, 3)[1:]
    y = F.se_residual(skip, x.half(), *gate, impl="triton")
    assert y.dtype == FLOAT and torch.equal(y, F.se_residual(skip, x.half().float(), *gate, impl="triton"))
