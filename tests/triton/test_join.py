"""Sums and statistics of tasks joined in order, in one step and in two."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("last", [7, 3])
@pytest.mark.parametrize("tasks", [1, 33, 128, 129, 300])
def test_tasks_of_seven_values_of_which_the_last_may_have_fewer(tasks, last):
    from nvae_fast.kernels._join import join_stats, join_sums

    x = torch.randn(tasks * 7 - 7 + last, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks)) + 30
    parts = torch.stack([torch.stack((t.mean(0), (t - t.mean(0)).square().sum(0))) for t in x.split(7)]).float()
    mean, var = join_stats(parts, len(x), 7)
    torch.testing.assert_close(mean.double(), x.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), x.var(0, correction=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(join_sums(parts).double(), parts.double().sum(0), rtol=2e-7, atol=0)
    assert torch.equal(join_sums(parts, torch.float16), join_sums(parts).half())
