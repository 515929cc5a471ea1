"""bn_act's native code: values and gradients against float64, statistics taken elsewhere, channel-wise NaN."""

from __future__ import annotations

import pytest
import torch
from norms import CL, bn_act, check, copied, image, needs_native, norm, outcome, same

from nvae_fast import functional as F

pytestmark = needs_native
# channel tails of every vector length, single columns and pixels, one image, several tasks
SHAPES = [(2, 1, 5, 3), (3, 7, 1, 1), (1, 30, 9, 5), (2, 33, 6, 2), (2, 90, 17, 1), (2, 600, 3, 3), (3, 40, 33, 20)]
ACTS = ["identity", "swish", "elu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, act, training, dtype):
    call = lambda t, n, impl: bn_act(t, n, impl, act)  # noqa: E731
    check(call, [image(*shape)], [norm(shape[1], training=training)], within_budget, dtype)


@pytest.mark.parametrize("shape", [(2, 33, 16, 16), (4, 7, 3, 2)], ids=str)
def test_a_mean_of_ten_deviations_costs_no_more_than_in_the_reference(within_budget, shape):
    check(bn_act, [image(*shape, mean=10.0)], [norm(shape[1])], within_budget)


@pytest.mark.parametrize("options", [dict(momentum=None), dict(momentum=0.0), dict(momentum=1.0), dict(eps=0.5)])
def test_options(within_budget, options):
    check(bn_act, [image(2, 9, 4, 3)], [norm(9, **options)], within_budget)


@pytest.mark.parametrize("training", [True, False])
def test_without_parameters_and_without_buffers(training):
    x, y = image(2, 9, 4, 3), []
    n = norm(9)
    for impl in ("cpu", "reference"):
        y += [F.bn_act(x, None, None, None, None, training=training, impl=impl)]
        y += [F.bn_act(x, n.weight, None, None, None, training=training, impl=impl)]
        y += [F.bn_act(x, None, n.bias, *copied(n)[2:4], training=training, impl=impl)]
    for a, b in zip(y[:3], y[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_the_gradients_that_are_wanted():
    x, n = image(2, 9, 4, 3), norm(9)
    weight = n.weight.requires_grad_()
    y = F.bn_act(x, weight, *n[1:5], training=True, impl="cpu")
    y.sum().backward()
    assert weight.grad is not None and x.grad is None and n.bias.grad is None


def test_statistics_taken_before_are_the_same():
    x, n = image(2, 33, 6, 5), norm(33)
    stats = torch.ops.nvae_fast.bn_act_stats(x)
    given = outcome(lambda t, n, impl: F.bn_act(t[0], *n[0][:5], training=True, stats=stats, impl=impl), [x], [n], "cpu")
    same(outcome(bn_act, [x], [n], "cpu"), given)
    with torch.no_grad():  # in evaluation the running statistics stand, given ones or not
        calls = [F.bn_act(x, *n[:5], training=False, stats=s, impl="cpu") for s in (stats, None)]
    assert torch.equal(*calls)


def test_buffers_in_a_low_precision():
    x, n = image(2, 9, 4, 3), norm(9, momentum=0.5)
    low = copied(n)._replace(running_mean=n.running_mean.bfloat16(), running_var=n.running_var.bfloat16())
    wide = copied(n)
    for m in (low, wide):
        F.bn_act(x, *m[:5], training=True, momentum=0.5, impl="cpu")
    torch.testing.assert_close(low.running_mean.float(), wide.running_mean, rtol=0.01, atol=0.01)
    torch.testing.assert_close(low.running_var.float(), wide.running_var, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_nan_and_infinity_stay_in_their_channel_or_element(impl, act):
    for value in (torch.nan, torch.inf):
        x, n = image(2, 9, 4, 3), norm(9)
        x[1, 4, 2, 1] = value
        y = F.bn_act(x, *copied(n)[:5], training=True, act=act, impl=impl)
        assert y[:, 4].isnan().all() and y.isfinite().sum() == y.numel() - y[:, 4].numel()
        y = F.bn_act(x, *n[:5], training=False, act=act, impl=impl)
        assert not y[1, 4, 2, 1].isfinite() and y.isfinite().sum() == y.numel() - 1


def test_far_out_values_saturate():
    x = torch.tensor([-1e4, -90.0, -1e-30, 0.0, 90.0, 1e4]).view(1, 1, 1, 6).contiguous(memory_format=CL)
    for act in ACTS:
        found = []
        for impl in ("cpu", "reference"):
            leaf = x.clone().requires_grad_()
            y = F.bn_act(leaf, None, None, torch.zeros(1), torch.ones(1), training=False, act=act, eps=1e-12, impl=impl)
            found.append((y, *torch.autograd.grad(y.sum(), leaf)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-30)


def test_auto_takes_the_native_code_for_channels_last_images_only():
    x, n = image(2, 9, 4, 3), norm(9)
    same(outcome(bn_act, [x], [n], "auto"), outcome(bn_act, [x], [n], "cpu"))
    same(outcome(bn_act, [x.contiguous()], [n], "auto"), outcome(bn_act, [x.contiguous()], [n], "reference"))
