"""What each of two processes does in test_processes.py: a module of its own, which a new process can import."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributed as dist

from nvae_fast.evaluation import evaluate
from nvae_fast.features import pixels, score
from nvae_fast.metrics import Moments, kernel_distance

CPU = torch.device("cpu")


def on_rank(rank: int, store: str, model, images, x, expected) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        mine = [images[:5], images[5:8]] if rank == 0 else [images[8:]]  # unequal shares and numbers of batches
        result = evaluate(model, mine)
        everywhere(result)
        one = expected["likelihood"]
        assert result.images == 12 and result.nelbo == pytest.approx(one.nelbo, abs=5 * one.nelbo_se)
        twice = evaluate(model, [images])
        assert twice.images == 24 and twice.nelbo != pytest.approx(one.nelbo, abs=1e-4), "both ranks draw the same noise"
        first = evaluate(model, mine if rank == 0 else [])  # one rank has no images
        assert first == expected["first"]

        for share in (x[:20] if rank == 0 else x[20:], x if rank == 1 else x[:0]):
            moments = Moments(x.shape[1])
            moments.add(share)
            count, mean, cov = moments.over_ranks(CPU).result()
            assert count == len(x)
            np.testing.assert_allclose(mean, x.mean(0).numpy(), rtol=1e-12)
            np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-9)
        kd = kernel_distance(x[rank::2, :2], -x[:, :2], device=CPU, subset_size=5, part=(rank, 2))
        everywhere(kd)
        assert kd.value == pytest.approx(expected["kd"]) and kd.subsets == 6

        found = score(model, expected["against"], pixels(1, CPU), ["fd"], num_samples=30, batch_size=8, seed=2)
        assert found["FD-pixels8x8"].samples == 30
        assert found["FD-pixels8x8"].value == pytest.approx(expected["score"]["FD-pixels8x8"].value, rel=1e-6)
    finally:
        dist.destroy_process_group()


def everywhere(value) -> None:
    """All processes hold the same."""
    gathered = [None, None]
    dist.all_gather_object(gathered, value)
    assert gathered[0] == gathered[1]
