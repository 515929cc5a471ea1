"""inverted_residual with impl="cuda": its depthwise stage runs in the emulator; the other stages are the CPU's here."""

from __future__ import annotations

import pytest
import torch
from norms import branch, branch_norms, branch_tensors

from nvae_fast.kernels import _impl


@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"stride": 2}, {"upsample": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(check, cuda_on_cpu, monkeypatch, dtype, options):
    monkeypatch.setitem(_impl._ops, "inverted_residual", {"cuda": lambda tensors: None})
    check(lambda t, n, i: branch(t, n, i, **options), branch_tensors(2, 6, 24, 7, 6, 5), branch_norms(6, 24, 7), dtype)
    kinds = {"any"} if options.get("stride", 1) * options.get("upsample", 1) == 2 else {"core"}
    assert set(cuda_on_cpu.ran) == kinds
