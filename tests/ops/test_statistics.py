"""Mean and variance that the ops take on their way, of values far from zero: a sum about zero would have lost the variance."""

from __future__ import annotations

import pytest
import torch
from norms import SETS, instruction_set, needs_native

from nvae_fast import functional as F

pytestmark = needs_native
CHANNELS = 20  # no multiple of any vector
OPS = {
    "bn_act": lambda x: (x, torch.ops.nvae_fast.bn_act_stats(x)),
    "pointwise_conv": lambda x: F.pointwise_conv(x, torch.eye(CHANNELS)[:, :, None, None], return_stats=True, impl="cpu"),
    "depthwise_conv": lambda x: F.depthwise_conv(
        x, torch.nn.functional.pad(torch.ones(CHANNELS, 1, 1, 1), (1, 1, 1, 1)), return_stats=True, impl="cpu"
    ),
    "se_residual": lambda x: F.se_residual(x, torch.zeros_like(x), None, None, None, None, return_stats=True, impl="cpu"),
}


@pytest.mark.parametrize("first", ["like the rest", "unlike the rest"])
@pytest.mark.parametrize("offset", [0.0, 10.0, 1000.0])
@pytest.mark.parametrize("op", OPS)
def test_mean_and_variance_far_from_zero(op, offset, first):
    x = torch.randn(4, CHANNELS, 60, 50, generator=torch.Generator().manual_seed(0)) + offset
    if first == "unlike the rest":
        x[:, :, 0, :6] -= 300.0
    x = x.contiguous(memory_format=torch.channels_last)
    exact = torch.stack((x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)))
    for isa in SETS:
        with instruction_set(isa):
            y, stats = OPS[op](x)
        assert torch.equal(y, x)
        assert ((stats[0] - exact[0]).abs() / exact[1].sqrt()).max() < 1e-4, isa
        assert (stats[1] / exact[1] - 1).abs().max() < 1e-4, isa
