"""depthwise_conv with a normalisation before it, nearest up-sampling, and statistics behind it, against float64."""

from __future__ import annotations

import pytest
import torch
from norms import SETS, check, check_stats, copied, depthwise, image, instruction_set, needs_native, norm, tensor

from nvae_fast import functional as F

pytestmark = needs_native
# N, C, H, W, k, stride, dilation, upsample
SHAPES = [
    (2, 32, 8, 8, 5, 1, 1, 1), (1, 30, 13, 9, 5, 1, 1, 1), (2, 7, 5, 1, 3, 1, 1, 1), (2, 33, 7, 10, 5, 2, 1, 1),
    (1, 90, 7, 3, 3, 2, 1, 1), (2, 24, 6, 2, 7, 1, 1, 1), (2, 18, 9, 14, 5, 2, 2, 1), (2, 17, 5, 31, 3, 1, 2, 1),
    (2, 40, 6, 5, 5, 1, 1, 2), (2, 16, 4, 4, 3, 1, 1, 2), (1, 9, 5, 3, 7, 1, 2, 2), (4, 1, 1, 1, 5, 1, 1, 2),
    (3, 7, 1, 1, 5, 1, 1, 1), (1, 600, 3, 5, 5, 1, 1, 1), (2, 20, 3, 2, 11, 2, 1, 1), (1, 33, 2, 3, 9, 1, 1, 2),
]  # fmt: skip


def tensors(n, c, h, w, k):
    return [image(n, c, h, w), tensor(c, 1, k, k, scale=1 / k)]


def call(stride, dilation, upsample, act="swish"):
    return lambda t, n, i: depthwise(t, n, i, act, stride=stride, dilation=dilation, upsample=upsample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(within_budget, shape, training, dtype):
    # PyTorch's weight gradient of a dilated bfloat16 convolution may hold memory that nobody wrote
    plain = torch.float32 if shape[6] > 1 else dtype
    check(call(*shape[5:]), tensors(*shape[:5]), [norm(shape[1], training=training)], within_budget, dtype, plain_dtype=plain)


@pytest.mark.parametrize("act", ["identity", "elu"])
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[3:4] + SHAPES[6:9], ids=str)
def test_activations(within_budget, shape, act):
    check(call(*shape[5:], act), tensors(*shape[:5]), [norm(shape[1])], within_budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[7] == 2], ids=str)
def test_upsampling_alone(within_budget, shape, dtype):
    check(call(*shape[5:]), tensors(*shape[:5]), [], within_budget, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mean", [0.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_of_the_output(shape, mean, dtype):
    x, w = tensors(*shape[:5])
    n, sizes = norm(shape[1]), dict(zip(("stride", "dilation", "upsample"), shape[5:], strict=True))
    for isa in SETS:
        with instruction_set(isa):
            args = (x + mean).to(dtype), w.to(dtype)
            y, stats = F.depthwise_conv(*args, **sizes, norm=copied(n), act="swish", return_stats=True, impl="cpu")
            assert torch.equal(y, F.depthwise_conv(*args, **sizes, norm=copied(n), act="swish", impl="cpu"))
            check_stats(stats, y)


def test_zeros_around_the_image_are_not_normalised():
    """Padding is 0 behind the normalisation: where every pixel equals the mean and the bias is 0, y is 0 up to the rim."""
    x = torch.full((1, 3, 4, 4), 5.0).contiguous(memory_format=torch.channels_last)
    n = F.Norm(running_mean=torch.full((3,), 5.0), running_var=torch.ones(3), training=False)
    assert F.depthwise_conv(x, tensor(3, 1, 5, 5), norm=n, act="swish", impl="cpu").abs().max() < 1e-5


def test_backward_in_place_is_the_backward():
    raw = torch.ops.nvae_fast
    x, w, y, dy = image(2, 33, 6, 5), tensor(33, 1, 3, 3), image(2, 33, 6, 5, seed=1), tensor(2, 33, 6, 5, seed=2)
    c, bn = tensor(3, 33), raw.bn_act_coefficients(raw.bn_act_stats(x), None, None, 1e-5)
    du, *others = raw.depthwise_conv_bwd(dy, y, c, x, bn, 1, w, 1, 1, 1)
    for arrange in (torch.clone, torch.Tensor.contiguous, lambda t: t.mT.contiguous().mT):
        mine = arrange(dy)
        found = raw.depthwise_conv_bwd_(mine, y, c, x, bn, 1, w, 1)
        assert torch.equal(mine, du) and all(torch.equal(a, b) for a, b in zip(found, others, strict=True))
