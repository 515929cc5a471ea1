"""pointwise_conv's Triton kernels: values and gradients against float64, tails of rows and channels, statistics, the C++ op."""

from __future__ import annotations

import pytest
import torch
from norms import CL, check_stats, copied, image, leaf, needs_native, norm, outcome, pointwise, same, tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _triton

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
FLOAT, HALF = torch.float32, torch.float16
# N, C_in, C_out, H, W: tiles of 32 rows in float32 and 64 in float16, 32 and 64 channels: parts of one, several, tails
SHAPES = [(1, 1, 7, 5, 1), (2, 7, 5, 5, 3), (1, 33, 17, 10, 4), (2, 40, 96, 5, 8), (3, 16, 1, 9, 5), (4, 130, 3, 1, 2)]
CASES = [(shape, act, dtype) for shape in SHAPES[:3] for act in (None, "identity", "elu") for dtype in (FLOAT, HALF)]
CASES += [(shape, "swish", dtype) for shape in SHAPES for dtype in (FLOAT, HALF)]


def tensors(n, c_in, c_out, h, w):
    return [image(n, c_in, h, w), tensor(c_out, c_in, 1, 1, scale=c_in**-0.5)]


@pytest.mark.parametrize(("shape", "act", "dtype"), CASES, ids=str)
def test_values_and_gradients(check, shape, act, dtype):
    call = lambda t, n, impl: pointwise(t, n, impl, act)  # noqa: E731
    check(call, tensors(*shape), [norm(shape[1])] if act else [], dtype, 2)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
def test_with_running_statistics(check, dtype):
    check(pointwise, tensors(2, 33, 17, 10, 4), [norm(33, training=False)], dtype, 2)


def test_a_mean_of_ten_deviations_costs_no_more_than_in_the_reference(check):
    x, w = tensors(2, 33, 17, 10, 4)
    check(pointwise, [x + 8.5, w], [norm(33)], FLOAT, 2)


@pytest.mark.parametrize("dtype", [FLOAT, HALF])
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_the_output(shape, mean, dtype):
    x, w = tensors(*shape)
    args, n = ((x + mean).to(dtype), w.to(dtype)), norm(shape[1])
    y, stats = F.pointwise_conv(*args, norm=copied(n), act="swish", return_stats=True, impl="triton")
    assert torch.equal(y, F.pointwise_conv(*args, norm=copied(n), act="swish", impl="triton"))
    check_stats(stats, y)


@pytest.mark.parametrize("shape", [(3, 7, 33, 13, 11), (9, 5, 3, 3, 3), (2, 4, 5, 8, 16)], ids=str)
def test_means_over_the_pixels_of_each_image(shape):
    """Images larger and smaller than a tile of rows, and of its size."""
    x, w = tensors(*shape)
    y, stats, means = torch.ops.nvae_fast.pointwise_conv_fwd(x, None, 0, w, True, True)
    torch.testing.assert_close(means, y.mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats, torch.ops.nvae_fast.pointwise_conv_fwd(x, None, 0, w, True, False)[1])


def arguments(shape):
    """Of the raw backward, with a normalisation on either side."""
    x, w = tensors(*shape)
    y, dy = (tensor(shape[0], shape[2], *shape[3:], seed=s) for s in (1, 2))
    return dy, y, tensor(3, shape[2], seed=3), x, tensor(5, shape[1], seed=4), 1, w


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backward_of_a_normalisation_behind(within_budget, shape):
    """g = c0 dy + c1 y + c2 is formed on the way in: rows past the end must not see c2."""
    dy, y, c, x, bn, act, w = arguments(shape)

    def plain(dtype):
        g = sum(a * b.to(dtype)[:, None, None] for a, b in zip((dy.to(dtype), y.to(dtype), 1), c, strict=True))
        leaves = [leaf(t.to(dtype)) for t in (x, w)]
        u = leaves[0] * bn[3].to(dtype)[:, None, None] + bn[4].to(dtype)[:, None, None]
        u.retain_grad()
        torch.nn.functional.conv2d(torch.nn.functional.silu(u), leaves[1]).backward(g)
        centred = leaves[0].detach() - bn[0].to(dtype)[:, None, None]
        return u.grad, leaves[1].grad, torch.stack((u.grad.sum((0, 2, 3)), (u.grad * centred).sum((0, 2, 3))))

    *got, table, _, _ = torch.ops.nvae_fast.pointwise_conv_bwd(dy, y, c, x, bn, act, w)
    for ours, theirs, truth in zip((*got, table[:2]), plain(torch.float32), plain(torch.float64), strict=True):
        within_budget(ours, theirs, truth)


@needs_native
def test_two_rows_of_c_are_three_with_a_first_of_ones(monkeypatch):
    dy, y, c, *rest = arguments((2, 33, 17, 6, 7))
    for _ in range(2):  # Triton, then the native code
        backward = torch.ops.nvae_fast.pointwise_conv_bwd
        for a, b in zip(*(backward(dy, y, t, *rest)[:3] for t in (c[1:], torch.cat((torch.ones(1, 17), c[1:])))), strict=True):
            assert torch.equal(a, b) and a.any()
        with pytest.raises(RuntimeError, match="c has shape"):
            backward(dy, y, c[:1], *rest)
        monkeypatch.undo()


@needs_native
@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_both_schemas_as_in_the_native_code(monkeypatch, before, behind):
    dy, y, c, x, bn, act, w = arguments((2, 33, 17, 6, 7))
    y, c, bn, act = *((y, c) if behind else (None, None)), *((bn, act) if before else (None, 0))
    found = []
    for _ in range(2):
        raw = torch.ops.nvae_fast
        forward = raw.pointwise_conv_fwd(x, bn, act, w, before, behind)
        found.append((*forward, *raw.pointwise_conv_bwd(dy, y, c, x, bn, act, w)))
        monkeypatch.undo()
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=5e-5, atol=5e-5)


def test_any_strides_64_bit_offsets_and_reruns_give_the_same_bits(monkeypatch):
    args, n = tensors(2, 33, 17, 10, 4), [norm(33)]
    dense = outcome(pointwise, args, n, "triton")
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :]  # noqa: E731
    same(dense, outcome(pointwise, args, n, "triton", sliced, torch.Tensor.contiguous))
    same(dense, outcome(pointwise, args, n, "triton"))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    same(dense, outcome(pointwise, args, n, "triton"))
    assert dense["y0"].is_contiguous(memory_format=CL)


def test_nan_stays_in_its_channel_or_pixel():
    x, w = tensors(2, 9, 5, 4, 3)
    x[1, 4, 2, 1] = torch.nan
    for n, lost in ((None, 5), (norm(9, training=False), 5), (norm(9), 2 * 5 * 12)):
        y = F.pointwise_conv(x, w, norm=n, act="swish" if n else "identity", impl="triton")
        assert y.isnan().sum() == lost and y[1, :, 2, 1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 9, 5, 4, 3), (2, 0, 5, 4, 3), (2, 9, 0, 4, 3)], ids=str)
def test_nothing_to_sum_gives_zeros(shape):
    x = torch.ones(shape[0], shape[1], *shape[3:], requires_grad=True)
    w = torch.ones(shape[2], shape[1], 1, 1, requires_grad=True)
    y, stats = F.pointwise_conv(x, w, return_stats=True, impl="triton")
    y.sum().backward()
    assert y.shape == (shape[0], shape[2], 4, 3) and x.grad.shape == x.shape and w.grad.shape == w.shape
    assert not any(t.any() for t in (y, stats, x.grad, w.grad))


def test_arguments_that_do_not_fit_are_refused():
    dy, y, c, x, bn, act, w = arguments((2, 9, 5, 4, 3))
    raw = torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="expected both y and c"):
        raw.pointwise_conv_bwd(dy, y, None, x, bn, act, w)
    with pytest.raises(RuntimeError, match="dy has shape"):
        raw.pointwise_conv_bwd(dy[:1], y, c, x, bn, act, w)
    with pytest.raises(RuntimeError, match="weight has shape .* expected torch.float32 .C_out, 9, 1, 1."):
        raw.pointwise_conv_fwd(x, bn, act, w[:, :8], False, False)
    with pytest.raises(RuntimeError, match="coefficients has shape"):
        raw.pointwise_conv_fwd(x, bn[:4], act, w, False, False)
