"""conv2d between bn_act's kernels, in Triton's interpreter: values, gradients, what is not wanted, and an empty batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from norms import copied, dense, image, leaf, norm, skipping, tensor

from nvae_fast import functional as F

# N, C_in, C_out, H, W, k, stride, padding, dilation
SHAPES = [(2, 20, 7, 6, 5, 3, 1, 1, 1), (1, 5, 8, 7, 3, 3, 2, 2, 2), (3, 33, 4, 3, 1, 1, 1, 0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("shape", "act", "training"), list(zip(SHAPES, ("swish", "elu", "identity"), (True, True, False), strict=True))
)
def test_values_and_gradients(check, shape, act, training, dtype):
    n, c_in, c_out, h, w, k, stride, padding, dilation = shape
    tensors = [image(n, c_in, h, w), tensor(c_out, c_in, k, k, scale=(c_in * k * k) ** -0.5), tensor(c_out)]
    call = lambda t, n, i: dense(t, n, i, act, stride=stride, padding=padding, dilation=dilation)  # noqa: E731
    check(call, tensors, [norm(c_in, training=training)], dtype, images=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("join", ["added", "beside", "beside twice"])
def test_x_passed_through(check, join, dtype):
    tensors = [image(2, 20, 6, 5), tensor(20, 20, 3, 3, scale=0.07)]
    check(skipping(dense, join, padding=1), tensors, [norm(20)], dtype, images=2)


@pytest.mark.parametrize(("join", "additions"), {"added": 1, "twice": 2}.items())
def test_all_gradients_of_x_are_added_without_a_launch(launches, join, additions):
    found = []
    for passed in (True, False):
        leaves = [leaf(image(2, 5, 4, 4)), leaf(tensor(5, 5, 3, 3))]
        y = skipping(dense, join, passed, padding=1)(leaves, [copied(norm(5))], "triton")
        dy = image(2, 5, 4, 4, seed=1)
        with launches() as names:
            found.append([torch.autograd.grad(y, leaves, dy), names])
    (ours, names), (autograds, others) = found
    assert Counter(others) == Counter(names) + Counter({"torch.add": additions}) and "torch.add" not in names
    for t, other in zip(ours, autograds, strict=True):
        torch.testing.assert_close(t, other, rtol=1e-5, atol=1e-5)


def test_gradients_that_nobody_wants_are_left_out(launches):
    x, weight = image(2, 5, 4, 4), leaf(tensor(3, 5, 3, 3))
    y = F.conv2d(x, weight, norm=copied(norm(5)), padding=1, impl="triton")
    with launches() as found:
        y.sum().backward()
    assert [name for name in found if not name.startswith("torch.")] == ["bn_act_fwd_kernel"]
    assert weight.grad.any()


def test_an_empty_batch(triton_on_cpu):
    x, weight, n = leaf(torch.zeros(0, 5, 4, 4)), leaf(tensor(3, 5, 3, 3)), copied(norm(5))
    y = F.conv2d(x, weight, norm=n, padding=1, impl="triton")
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4) and x.grad.shape == x.shape and not weight.grad.any()
    assert torch.equal(n.running_mean, norm(5).running_mean)
