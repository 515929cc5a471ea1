"""pointwise_conv: values and gradients against float64, with and without the normalisation before it, statistics behind it."""

from __future__ import annotations

import pytest
import torch
from norms import (
    SETS,
    check,
    check_stats,
    copied,
    image,
    instruction_set,
    leaf,
    needs_native,
    norm,
    outcome,
    pointwise,
    same,
    skipping,
    tensor,
)
from pointwise_parts import EMPTY, PARTS, everything, nothing, some
from pointwise_parts import tensors as parts

from nvae_fast import functional as F

# N, C_in, C_out, H, W
SHAPES = [(2, 32, 192, 8, 8), (1, 1, 7, 5, 3), (1, 30, 90, 9, 1), (2, 7, 5, 5, 2), (1, 600, 33, 3, 3), (3, 17, 100, 6, 5),
          (2, 90, 1, 7, 2), (4, 33, 30, 1, 1), (2, 16, 48, 33, 20), (2, 20, 40, 64, 50)]  # fmt: skip


def tensors(n, c_in, c_out, h, w):
    return [image(n, c_in, h, w), tensor(c_out, c_in, 1, 1, scale=c_in**-0.5)]


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", [None, "identity", "swish", "elu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, act, dtype):
    norms = [norm(shape[1])] if act else []
    check(lambda t, n, impl: pointwise(t, n, impl, act), tensors(*shape), norms, within_budget, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["identity", "swish", "elu"])
@pytest.mark.parametrize("shape", [(2, 20, 9, 33, 5, 8), (2, 600, 3, 7, 2, 4), (3, 2, 1, 100, 6, 5)], ids=str)
def test_with_all_that_may_be_added(within_budget, shape, act, dtype):
    check(everything(act, passed=act == "elu"), parts(*shape), [], within_budget, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_x_handed_on_over_several_tasks(within_budget, dtype):
    """Blocks of whole vectors and the rest of one, two tiles a task, a last task that is short."""
    args = [image(3, 90, 19, 13), tensor(90, 90, 1, 1, scale=0.1), tensor(90)]
    plain = lambda t, n, impl, **options: F.pointwise_conv(*t, act="elu", impl=impl, **options)  # noqa: E731
    check(skipping(plain), args, [], within_budget, dtype)


@needs_native
@pytest.mark.parametrize("beside", [False, True])
def test_the_gradient_of_x_handed_on_may_have_any_strides(beside):
    x, weight, bias, other, _ = parts(2, 9, 5, 7, 3, 4)
    weight = weight if beside else weight[:, :9].contiguous()
    dy, dx, found = tensor(2, 7, 3, 4, seed=3), tensor(2, 9, 3, 4, seed=4), []
    window = lambda t: torch.nn.functional.pad(t, (1, 0))[..., 1:]  # noqa: E731
    for arrange in (torch.clone, lambda t: t.contiguous(memory_format=torch.channels_last), window):
        leaves = [leaf(t) for t in (x, weight, bias)]
        out = F.pointwise_conv(*leaves, beside=other if beside else None, act="elu", return_x=1, impl="cpu")
        found.append(torch.autograd.grad(out, leaves, (dy, arrange(dx))))
    for grads in found[1:]:
        assert all(map(torch.equal, grads, found[0]))


@needs_native
@pytest.mark.parametrize("channels", [9, 600])
@pytest.mark.parametrize("given", PARTS, ids=str)
def test_each_part_alone(within_budget, given, channels):
    call, args = some(given, channels)
    check(call, args, [], within_budget)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_with_running_statistics(within_budget, shape, dtype):
    check(pointwise, tensors(*shape), [norm(shape[1], training=False)], within_budget, dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_the_output(shape, mean, dtype):
    x, w = tensors(*shape)
    n = norm(shape[1])
    for isa in SETS:
        with instruction_set(isa):
            args = (x + mean).to(dtype), w.to(dtype)
            y, stats = F.pointwise_conv(*args, norm=copied(n), act="swish", return_stats=True, impl="cpu")
            assert torch.equal(y, F.pointwise_conv(*args, norm=copied(n), act="swish", impl="cpu"))
            check_stats(stats, y)


@needs_native
def test_means_over_the_pixels_of_each_image():
    x, w = image(3, 7, 13, 11), tensor(33, 7, 1, 1)
    y, stats, means = torch.ops.nvae_fast.pointwise_conv_fwd(x, None, 0, w, True, True)
    torch.testing.assert_close(means, y.mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats, torch.ops.nvae_fast.pointwise_conv_fwd(x, None, 0, w, True, False)[1])


@needs_native
def test_means_of_a_large_image_keep_their_digits():
    """Those of values that all have one sign: added up one by one, a task's 5,625 would lose four bits."""
    x = (1 + torch.rand(1, 3, 600, 600, generator=torch.Generator().manual_seed(0))).contiguous(
        memory_format=torch.channels_last
    )
    y, _, means = torch.ops.nvae_fast.pointwise_conv_fwd(x, None, 0, torch.eye(3)[:, :, None, None], False, True)
    exact = y.double().mean((2, 3))
    assert ((means - exact) / exact).abs().max() <= 0.5 * torch.finfo(torch.float32).eps


@needs_native
def test_auto_takes_the_native_code_for_channels_last_images_only():
    args, n = tensors(2, 9, 7, 4, 3), [norm(9)]
    same(outcome(pointwise, args, n, "auto"), outcome(pointwise, args, n, "cpu"))
    nchw = [t.contiguous() for t in args]
    same(outcome(pointwise, nchw, n, "auto"), outcome(pointwise, nchw, n, "reference"))


@needs_native
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_sum_leaves_what_is_added(shape):
    nothing(shape, "cpu")


def test_the_reference_is_a_convolution_of_both_inputs():
    x, weight, bias, beside, addend = parts(2, 9, 5, 7, 3, 4)
    a = torch.nn.functional.elu(torch.cat((x, beside), 1))
    y = F.pointwise_conv(x, weight, bias, beside=beside, addend=addend, act="elu", impl="reference")
    torch.testing.assert_close(y, addend + torch.nn.functional.conv2d(a, weight, bias), rtol=1e-5, atol=1e-5)


def test_the_reference_is_nn_conv2d_behind_nn_batch_norm():
    conv, bn = torch.nn.Conv2d(6, 9, 1, bias=False), torch.nn.BatchNorm2d(6)
    x = torch.randn(2, 6, 4, 3)
    n = F.Norm(bn.weight, bn.bias, bn.running_mean.clone(), bn.running_var.clone(), momentum=0.1)
    y = F.pointwise_conv(x, conv.weight, norm=n, act="swish", impl="reference")
    torch.testing.assert_close(y, conv(torch.nn.functional.silu(bn(x))), rtol=0, atol=0)
    assert torch.equal(n.running_mean, bn.running_mean) and torch.equal(n.running_var, bn.running_var)
