"""bn_act's Triton kernels: values and gradients against float64, tails of rows and channels, any layout, the C++ op."""

from __future__ import annotations

import pytest
import torch
from norms import CL, bn_act, copied, image, needs_native, norm, outcome, same, tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _impl, _triton

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
ACTS = ("identity", "swish", "elu")
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
# Tiles hold 2048 values, of 64 channels at most: 300 rows are part of one tile, two with a tail, ten with a tail.
SMALL = [
    (shape, act, dtype) for shape in [(1, 1, 1, 5), (1, 7, 5, 1), (1, 33, 1, 5)] for act in ACTS for dtype in (FLOAT, HALF)
]
SMALL += [((1, 192, 1, 5), "swish", dtype) for dtype in (FLOAT, HALF, BFLOAT)]
TALL = [((3, 1, 20, 5), "swish", FLOAT), ((3, 7, 20, 5), "elu", FLOAT), ((3, 7, 20, 5), "swish", HALF)]
TALL += [((3, 33, 20, 5), "swish", FLOAT), ((3, 33, 20, 5), "identity", HALF), ((3, 192, 7, 5), "swish", FLOAT)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "act", "dtype"), SMALL, ids=str)
def test_values_and_gradients(check, shape, act, dtype, training):
    call = lambda t, n, impl: bn_act(t, n, impl, act)  # noqa: E731
    check(call, [image(*shape)], [norm(shape[1], training=training)], dtype, 1)


@pytest.mark.parametrize(("shape", "act", "dtype"), TALL, ids=str)
def test_values_and_gradients_of_several_tiles(check, shape, act, dtype):
    call = lambda t, n, impl: bn_act(t, n, impl, act)  # noqa: E731
    check(call, [image(*shape)], [norm(shape[1])], dtype, 1)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels", [1, 7, 33, 192])
def test_a_single_row(check, channels, act):
    call = lambda t, n, impl: bn_act(t, n, impl, act)  # noqa: E731
    check(call, [image(1, channels, 1, 1)], [norm(channels, training=False)], FLOAT, 1)


def test_a_mean_of_ten_deviations_costs_no_more_than_in_the_reference(check):
    check(bn_act, [image(3, 33, 20, 5, mean=10.0)], [norm(33)], FLOAT, 1)


def test_the_pivot_keeps_the_variance_of_a_far_mean():
    """Sums about zero would lose all digits here; the means of tasks are rounded to half a thousandth of a deviation."""
    x = tensor(1, 7, 20, 15, shift=0.0) + 4096.0
    mean, var = torch.ops.nvae_fast.bn_act_stats(x)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels of a larger buffer": lambda t: torch.cat((t, t), 1).contiguous(memory_format=CL)[:, t.shape[1] :],
    "expanded": lambda t: t[:, :, :1].expand_as(t),
    "transposed": lambda t: t.transpose(2, 3).contiguous(memory_format=CL).transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_x_and_of_its_gradient(layout):
    x, n = image(2, 9, 4, 3), norm(9)
    arrange = LAYOUTS[layout]
    dense = outcome(bn_act, [x], [n], "triton", *(lambda t: arrange(t).contiguous(memory_format=CL),) * 2)
    same(dense, outcome(bn_act, [x], [n], "triton", arrange, arrange))
    assert dense["y0"].is_contiguous(memory_format=CL)


def test_offsets_of_64_bits_and_reruns_give_the_same_bits(monkeypatch):
    x, n = image(2, 33, 20, 5), norm(33)
    narrow = outcome(bn_act, [x], [n], "triton")
    same(narrow, outcome(bn_act, [x], [n], "triton"))
    monkeypatch.setattr(_triton, "wide", lambda t: True)
    same(narrow, outcome(bn_act, [x], [n], "triton"))


def test_options_and_buffers_of_other_types(check):
    for options in (dict(momentum=None), dict(momentum=1.0), dict(eps=0.5)):
        check(bn_act, [image(2, 9, 4, 3)], [norm(9, **options)], FLOAT, 1)
    x, found = image(2, 9, 4, 3), []
    for impl in ("triton", "reference"):
        mean, var = torch.zeros(18, dtype=torch.float64)[::2], torch.ones(9, dtype=torch.float16)
        found.append((F.bn_act(x, None, None, mean, var, training=True, impl=impl), mean, var))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3 if a.dtype == HALF else 1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
def test_nan_stays_in_its_channel_or_element(act):
    x, n = image(2, 9, 4, 3), norm(9)
    x[1, 4, 2, 1] = torch.nan
    for training, channel in ((True, True), (False, False)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = F.bn_act(leaf, *copied(n)[:4], training=training, act=act, impl="triton")
        y.backward(torch.ones_like(y))
        for t in (y, leaf.grad):
            lost = t[:, 4].numel() if channel else int(t[1, 4, 2, 1].isnan())
            assert t.isnan().sum() == lost and (t[:, 4].isnan().all() if channel else True)


def test_an_empty_batch():
    x = torch.empty(0, 9, 4, 3, requires_grad=True)
    y = F.bn_act(x, None, None, torch.zeros(9), torch.ones(9), training=False, impl="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert (
        not torch.ops.nvae_fast.bn_act_stats(x).any() and not torch.ops.nvae_fast.bn_act_sums(x, x, torch.ones(5, 9), 1).any()
    )


@needs_native
@pytest.mark.parametrize("act", ACTS)
def test_every_schema_as_in_the_native_code(monkeypatch, act):
    x, n = image(2, 33, 6, 7), norm(33)
    ours = outcome(lambda t, n, i: bn_act(t, n, i, act), [x], [n], "triton")
    du, c = tensor(2, 33, 6, 7, seed=3), tensor(3, 33)
    moved = du.clone(memory_format=torch.contiguous_format)  # not channels-last: copied back
    torch.ops.nvae_fast.bn_act_affine_(moved, x, c)
    monkeypatch.undo()
    theirs = outcome(lambda t, n, i: bn_act(t, n, i, act), [x], [n], "cpu")
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=2e-5, atol=2e-5)
    assert _impl.load_native()[0] is not None
    torch.ops.nvae_fast.bn_act_affine_(du, x, c)
    torch.testing.assert_close(moved, du, rtol=1e-6, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    x, raw = image(2, 9, 4, 3), torch.ops.nvae_fast
    with pytest.raises(RuntimeError, match="dy has shape"):
        raw.bn_act_sums(x[:1], x, torch.ones(5, 9), 1)
    with pytest.raises(RuntimeError, match="coefficients has shape"):
        raw.bn_act_fwd(x, torch.ones(5, 8), 1)
    with pytest.raises(RuntimeError, match="expected .* torch.float32"):
        raw.bn_act_bwd(x.half(), x, torch.ones(5, 9), 1, torch.ones(3, 9))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("channels", [7, 192])
def test_a_bias_that_x_lacks(check, channels, training):
    given = norm(channels, training=training, offset=tensor(channels, shift=2.0))
    check(bn_act, [image(2, channels, 3, 5)], [given], FLOAT, 1)
    found = outcome(bn_act, [image(2, channels, 3, 5)], [given], "triton")
    assert training != found["doffset0"].any()
