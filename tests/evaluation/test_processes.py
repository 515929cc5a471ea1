"""Several processes give the numbers of one: likelihood, pooled moments, kernel distance, distances of samples."""

from __future__ import annotations

import torch
import torch.multiprocessing as mp
from joined import CPU, on_rank

from nvae_fast.data.base import MemorySource
from nvae_fast.evaluation import evaluate
from nvae_fast.features import pixels, reference, score
from nvae_fast.metrics import kernel_distance


def test_two_processes(make, waves, tmp_path):
    model = make()
    images = (torch.rand(12, 1, 16, 16, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    x = torch.randn(33, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[20:, 2:] += 50  # the processes' means differ by much more than their spread: averaged covariances would be far off
    against = reference(MemorySource("waves", waves[..., None]), pixels(1, CPU), tmp_path, CPU)
    shares = [kernel_distance(x[r::2, :2], -x[r::2, :2], device=CPU, subset_size=5) for r in (0, 1)]
    expected = {
        "likelihood": evaluate(model, [images]),
        "first": evaluate(model, [images[:5], images[5:8]]),
        "kd": sum(s.value for s in shares) / 2,
        "against": against,
        "score": score(model, against, pixels(1, CPU), ["fd"], num_samples=30, batch_size=8, seed=2),
    }
    mp.spawn(on_rank, (str(tmp_path / "store"), model, images, x, expected), nprocs=2)
