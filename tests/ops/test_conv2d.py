"""conv2d: values, gradients and running statistics against float64; what is kept; refused arguments."""

from __future__ import annotations

import pytest
import torch
from norms import check, copied, dense, image, leaf, needs_native, norm, tensor

from nvae_fast import functional as F

# N, C_in, C_out, H, W, k, stride, padding, dilation
SHAPES = [(2, 16, 24, 8, 8, 3, 1, 1, 1), (1, 20, 7, 9, 5, 3, 2, 1, 1), (2, 5, 8, 6, 6, 3, 1, 2, 2),
          (3, 33, 4, 5, 3, 1, 1, 0, 1), (2, 3, 6, 7, 1, 5, 1, 2, 1)]  # fmt: skip


def case(n, c_in, c_out, h, w, k, stride, padding, dilation):
    sizes = dict(stride=stride, padding=padding, dilation=dilation)
    return [image(n, c_in, h, w), tensor(c_out, c_in, k, k, scale=(c_in * k * k) ** -0.5), tensor(c_out)], sizes


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, training, dtype):
    tensors, sizes = case(*shape)
    check(lambda t, n, i: dense(t, n, i, **sizes), tensors, [norm(shape[1], training=training)], within_budget, dtype)


@needs_native
@pytest.mark.parametrize("act", ["identity", "elu"])
def test_activations(within_budget, act):
    tensors, sizes = case(*SHAPES[1])
    check(lambda t, n, i: dense(t, n, i, act, **sizes), tensors[:2], [norm(20)], within_budget)


@needs_native
def test_only_x_is_kept():
    tensors, sizes = case(*SHAPES[0])
    leaves, kept = [leaf(t) for t in tensors], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}), lambda t: t):
        F.conv2d(*leaves, norm=copied(norm(16)), act="swish", impl="cpu", **sizes)
    for t in leaves[:2]:
        assert kept.pop(t.data_ptr()) == t.numel()
    assert sum(kept.values()) == 5 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(4, 3, 3, 3)), r"weight has shape \(4, 3, 3, 3\): expected \[C_out, 5, k, k\]"),
        (dict(bias=torch.zeros(3)), r"bias has shape \(3,\): expected \(4,\)"),
        (dict(stride=0), "stride 0: expected an integer of at least 1"),
        (dict(stride=(1, 1)), "stride is tuple: expected a whole number"),
        (dict(padding=-1), "padding -1: expected an integer of at least 0"),
        (dict(padding="same"), "padding is str 'same': expected a whole number"),
        (dict(norm=None), "norm is None: expected a Norm"),
        (dict(bias=torch.zeros(4, device="meta")), "bias is on meta: expected cpu, where x is"),
        (dict(act="relu"), "act 'relu': expected one of identity, swish, elu"),
    ],
)
def test_bad_arguments(change, message):
    arguments = dict(x=torch.zeros(2, 5, 4, 4), weight=torch.zeros(4, 5, 3, 3), norm=F.Norm(), act="swish") | change
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        F.conv2d(**arguments)
    assert "\n" not in str(caught.value)
