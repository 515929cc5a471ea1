"""One step of Adamax on many tensors, ours beside torch's multi-tensor Adamax and, as the stock alternative, its fused Adam.
Each is checked against the same rule in float64 first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.suite import check
from nvae_fast.benchmarks.timing import gpu_columns, interleaved, peak_bytes
from nvae_fast.optim import FusedAdamax

SHAPES = [(64,), (384, 1, 5, 5), (64, 64, 1, 1), (384,), (184, 59, 1, 1)]  # 25,000 parameters
COUNT = 1000
STEPS = 3  # before numbers are compared
OPTIONS = {"lr": 1e-3, "weight_decay": 3e-4}
SECONDS = 30.0

RULES: dict[str, tuple[Callable[..., torch.optim.Optimizer], type[torch.optim.Optimizer]]] = {
    "ours:auto": (FusedAdamax, torch.optim.Adamax),
    "eager": (lambda p, **options: torch.optim.Adamax(p, foreach=True, **options), torch.optim.Adamax),
    "adam_fused": (lambda p, **options: torch.optim.Adam(p, fused=True, **options), torch.optim.Adam),
}
"""What competes, and the rule of torch, one tensor after another, that its numbers are held to."""


def stepped(make: Callable[..., torch.optim.Optimizer], count: int, device: torch.device,
            dtype: torch.dtype = torch.float32) -> tuple[torch.optim.Optimizer, list[Tensor]]:  # fmt: skip
    """An optimiser after `STEPS` steps on the same values for each `dtype`, and its parameters."""
    g = torch.Generator().manual_seed(0)
    shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
    params = [nn.Parameter(torch.randn(s, generator=g).to(device, dtype)) for s in shapes]
    optimizer = make(params, **OPTIONS)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g).to(device, dtype)
        optimizer.step()
    return optimizer, params


def measure_optimizer(*, rounds: int, device: torch.device, copy_rate: float, count: int | None = None) -> list[Row]:
    """The rows, ours first."""
    count = COUNT if count is None else count
    optimizers, checks = {}, {}
    for name, (make, rule) in RULES.items():
        optimizers[name], found = stepped(make, count, device)
        found = [p.detach().clone() for p in found]  # before any step that is timed

        def plain(params: list[Tensor], rule: Any = rule, **options: Any) -> torch.optim.Optimizer:
            return rule(params, foreach=False, **options)

        yardstick, truth = ([p.detach() for p in stepped(plain, count, device, dtype)[1]]
                            for dtype in (torch.float32, torch.float64))  # fmt: skip
        checks[name] = check(found, [yardstick], truth)
    peaks = {name: peak_bytes(optimizer.step, device) for name, optimizer in optimizers.items()}
    times = interleaved({name: o.step for name, o in optimizers.items()}, rounds=rounds, budget_s=SECONDS)
    values = sum(p.numel() for p in optimizers["eager"].param_groups[0]["params"])
    moved = 7 * 4 * values  # parameter, gradient and two moments read, all but the gradient written
    return [
        {
            "suite": "optimizer", "case": f"adamax/{count}x{values}/float32", "op": "adamax", "shape": [count],
            "dtype": "float32", "layout": "contiguous", "impl": name, "phase": "step", **times[name]._asdict(),
            "images_per_s": None, "peak_bytes": peaks[name], "bytes": moved,
            "copy_share": moved / times[name].median_ms * 1e3 / copy_rate, **gpu_columns(None, None),
            "check": checks[name],
        }
        for name in RULES
    ]  # fmt: skip
