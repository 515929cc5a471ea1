"""Arguments at the edge, where an op has to agree with torch's modules or refuse."""

from __future__ import annotations

import pytest
import torch

from nvae_fast import functional as F
from nvae_fast.layers import BatchNormAct2d

CL = torch.channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointwise_conv_without_input_channels_is_zero(dtype):
    for _ in range(3):  # memory that held something else
        F.pointwise_conv(torch.randn(2, 8, 64, 64, dtype=dtype), torch.randn(64, 8, 1, 1, dtype=dtype), impl="cpu")
        x, w = torch.randn(2, 0, 64, 64, dtype=dtype), torch.randn(64, 0, 1, 1, dtype=dtype)
        y, stats = F.pointwise_conv(x, w, return_stats=True, impl="cpu")
        assert not y.any() and not stats.any()


@pytest.mark.parametrize("dilation", [7, 9, 2**20, 2**33])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_conv_dilated_beyond_the_image_is_its_middle_tap(dilation, stride):
    x = torch.randn(1, 16, 7, 5).contiguous(memory_format=CL).requires_grad_()
    w = torch.randn(16, 1, 5, 5, requires_grad=True)
    y = F.depthwise_conv(x, w, dilation=dilation, stride=stride, impl="cpu")
    assert torch.equal(y, (x * w[:, 0, 2, 2].view(1, -1, 1, 1))[..., ::stride, ::stride])
    y.sum().backward()
    assert w.grad.count_nonzero() == 16


def test_se_residual_refuses_a_gate_without_hidden_units():
    x = torch.randn(2, 16, 4, 4)
    with pytest.raises(ValueError, match="at least one hidden unit"):
        F.se_residual(x, x, torch.randn(0, 16), torch.randn(0), torch.randn(16, 0), torch.randn(16))


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_an_empty_batch_leaves_running_statistics_alone(shape):
    ours, torchs = BatchNormAct2d(8, act="identity"), torch.nn.BatchNorm2d(8)
    x = torch.empty(shape).contiguous(memory_format=CL)
    for bn in (ours, torchs):
        bn.running_mean.fill_(1.0), bn(x)
    for key, value in torchs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CL])
def test_tracking_switched_off_later_acts_as_in_batch_norm(memory_format):
    ours, torchs = BatchNormAct2d(8, act="identity"), torch.nn.BatchNorm2d(8)
    x = (3 * torch.randn(4, 8, 5, 5) + 2).contiguous(memory_format=memory_format)
    for bn in (ours, torchs):
        bn(x)
        bn.track_running_stats = False
    for training in (True, False):
        torch.testing.assert_close(ours.train(training)(x), torchs.train(training)(x))
    for key, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_autocast_leaves_float64_alone():
    x, w = torch.randn(2, 16, 6, 6, dtype=torch.float64), torch.randn(8, 16, 1, 1, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.pointwise_conv(x, w).dtype == torch.float64
