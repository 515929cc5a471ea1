"""Numbers only: every op and implementation that runs on a device, on small awkward shapes and in every dtype, twice; and the
training step, which has the same bits every time, as a CUDA graph too."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nvae_fast.benchmarks.cases import RECIPES, Case
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.steps import KL_COEFF, SPECTRAL_COEFF, make_batch, shrunk
from nvae_fast.benchmarks.suite import RIVALS, check, contenders
from nvae_fast.model import NVAE
from nvae_fast.optim import make_optimizer
from nvae_fast.presets import PRESETS
from nvae_fast.regularization import SpectralState
from nvae_fast.training.step import TrainingStep

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
STEPS, STEP = 8, "training_step"
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}


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


def verify_steps(device: torch.device) -> Iterator[Row]:
    """For every precision a row of the trainer's step and, on a GPU, one of its CUDA graph: whether a second run has the same
    losses and weights to the bit; `error`, which has to be 0, is how far the graph's are from those without one."""
    torch.backends.cudnn.deterministic = True  # as `nvae-fast train`
    for precision in PRECISIONS[device.type]:
        alone = _trained(device, precision, graph=False)
        for name, graph in {"ours:auto": False, "ours:graph": True}.items():
            if graph and device.type != "cuda":
                continue
            found, again = (_trained(device, precision, graph=graph) for _ in range(2))
            error = max(((a.double() - b.double()).abs().max().item() for a, b in zip(found, alone, strict=True)))
            finite = all(t.isfinite().all() for t in found)
            yield {
                "suite": "check", "case": f"{STEP}/{precision}", "op": STEP, "shape": [STEPS], "dtype": precision,
                "layout": "channels_last", "impl": name, "phase": "step",
                "same_bits": all(map(torch.equal, found, again)),
                "check": {"ok": finite and error == 0, "error": error if finite else None, "budget": 0.0},
            }  # fmt: skip


def _trained(device: torch.device, precision: str, *, graph: bool) -> list[Tensor]:
    """The losses of some steps of the demo, always the same ones, and the weights and statistics behind them."""
    config = shrunk(PRESETS["demo"], layers=1, batch_size=8)
    torch.manual_seed(0)
    model = NVAE(config).to(device, memory_format=torch.channels_last).train()
    x, noise = make_batch(config, device)
    x = x.contiguous(memory_format=torch.channels_last)
    step = TrainingStep(model, make_optimizer(model), SpectralState(), precision=precision,
                        loss=partial(model.loss, noise=noise), graph=graph)  # fmt: skip
    rate = config.training.learning_rate
    losses = [step(x, rate=rate, kl_coeff=KL_COEFF, norm_coeff=SPECTRAL_COEFF)["total"] for _ in range(STEPS)]
    if graph and not step.recorded:
        losses[-1] = losses[-1] * torch.nan  # a line has said why
    return [torch.stack(losses).detach(), *(t.detach() for t in (*model.parameters(), *model.buffers()))]


def line(row: Row) -> str:
    """What a failed row is about."""
    c, error = row["check"], "not finite"
    if c["error"] is not None and c["budget"] is not None:
        error = f"error {c['error']:.2e}, budget {c['budget']:.2e}"
    bits = "" if row["same_bits"] else "; a second run has other bits"
    return f"{row['case']} {row['layout']} {row['impl']} {row['phase']}: {error}{bits}"
