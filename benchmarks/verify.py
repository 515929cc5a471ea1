"""Numbers only: every op and implementation that runs on a device, on small awkward shapes and in every dtype, twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from nvae_fast.benchmarks.cases import RECIPES, Case
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.suite import RIVALS, check, contenders

IMAGES = ((2, 32, 16, 16), (3, 20, 7, 5), (1, 33, 12, 9), (2, 72, 1, 3), (1, 8, 40, 36))
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "preact_branch": ((2, 32, 16, 16), (3, 20, 7, 5), (1, 33, 8, 24), (1, 72, 40, 8)),
    "residual_normal": ((2, 20, 8, 8), (3, 5, 7, 3), (1, 1, 1, 1)),
    "logistic_mixture_log_prob": ((2, 100, 8, 8), (1, 100, 5, 7)),
    "power_iteration": ((100,),),
    "weight_norm": ((53,), (3,)),
    "flow_cell": ((2, 20, 16, 16), (1, 4, 7, 5), (3, 8, 1, 6)),
}
FLOAT32_ONLY = {"power_iteration", "weight_norm"}


def cases(device: torch.device) -> list[Case]:
    """All that is verified on a device: float16 is a GPU's."""
    low = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.bfloat16,)
    return [
        Case("check", op, shape, dtype, layout)
        for op in RECIPES
        for shape in SHAPES.get(op, IMAGES)
        for dtype in (torch.float32, *(() if op in FLOAT32_ONLY else low))
        for layout in (("channels_last", "contiguous") if dtype == torch.float32 else ("channels_last",))
    ]


def verify(case: Case, device: torch.device) -> Iterator[Row]:
    """A row for each of our implementations: forward, forward and backward, and whether a second run has the same bits."""
    runners, truth = contenders(case, device)
    for phase in ("fwd", "fwd_bwd"):
        plain = [runners[name](phase) for name in RIVALS]
        for name, run in runners.items():
            if not name.startswith("ours:") or name == "ours:reference":
                continue
            found = run(phase)
            result: dict[str, Any] = check(found, plain, truth)
            again = all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(found, run(phase), strict=True))
            yield {
                "suite": "check", "case": case.name, "op": case.op, "shape": list(case.shape), "dtype": case.dtype_name,
                "layout": case.layout, "impl": name, "phase": phase, "same_bits": again, "check": result,
            }  # fmt: skip


def line(row: Row) -> str:
    """What a failed row is about."""
    c, error = row["check"], "not finite"
    if c["error"] is not None and c["budget"] is not None:
        error = f"error {c['error']:.2e}, budget {c['budget']:.2e}"
    bits = "" if row["same_bits"] else "; a second run has other bits"
    return f"{row['case']} {row['layout']} {row['impl']} {row['phase']}: {error}{bits}"
