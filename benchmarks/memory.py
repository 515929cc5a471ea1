"""Bytes that a training step needs, ours in each memory mode beside the plain model, at two batches; the largest batch within a
budget follows from the two.

Weights, buffers and two moments, and what is alive at the worst moment of the step. Measured on a step whose numbers were
checked against float64, or, where that would not fit into the machine, traced on tensors without values (`nvae_fast.estimate`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from nvae_fast.benchmarks.plain import plain
from nvae_fast.benchmarks.report import Row
from nvae_fast.benchmarks.steps import FORMATS, Step, check_all, contenders, dtype_name, layout_name
from nvae_fast.benchmarks.timing import gpu_columns, peak_bytes
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.estimate import Tracer, available_memory
from nvae_fast.kernels.inverted_residual import MEMORY

if TYPE_CHECKING:
    from nvae_fast.benchmarks.nvlabs import Checkout

EAGER = {name: layout for name, layout in FORMATS.items() if name.startswith("eager")}
SHARE = 0.7  # of the memory there is, that a run may need

Found = dict[str, tuple[int, dict[str, Any] | None, str]]  # peak, check and type by contender


def measure_memory(config: NVAEConfig, *, device: torch.device, budget: int | None = None, checkout: Checkout | None = None,
                   say: Callable[[str], None] = print) -> list[Row]:  # fmt: skip
    """Rows of one configuration: each contender at its batch and at twice that, ours first. `budget` in bytes (None: what the
    device, or the machine, has). The published code of a `checkout` competes where it can run: it cannot be traced."""
    available = available_memory(device)
    batch = config.training.batch_size
    worst = Tracer(config, rival=plain, layout=torch.contiguous_format).footprint("balanced", batch)
    traced = worst.at(2 * batch) * 2 > SHARE * available  # twice: the truth in float64 stands beside
    batches = (batch, 2 * batch)
    if traced and checkout:
        say("  no row for nvlabs: its step would not fit here, and cannot be traced")
    found = by_tracing(config, batches) if traced else [measured(config, n, device, checkout, say) for n in batches]
    found = [{name: f[name] for name in found[0] if all(name in g for g in found)} for f in found]
    budget = available if budget is None else budget
    rows = []
    for name in found[0]:
        first, second = (f[name][0] for f in found)
        per_image = (second - first) / batch
        largest = max(int((budget - (first - per_image * batch)) / per_image), 0) if per_image > 0 else None
        for n, f in zip(batches, found, strict=True):
            rows.append(
                {
                    "suite": "memory", "case": f"memory/{config.name}", "op": "train_step",
                    "dtype": f[name][2],
                    "shape": [n, config.channels, *config.image_size],
                    "layout": layout_name(name), "impl": name, "phase": "step",
                    "median_ms": None, "min_ms": None, "iqr_ms": None, "rounds": None, "images_per_s": None,
                    "peak_bytes": f[name][0], "bytes": None, "copy_share": None, **gpu_columns(None, None),
                    "check": f[name][1],
                    "per_image_bytes": round(per_image), "largest_batch": largest, "budget_bytes": budget, "traced": traced,
                }
            )  # fmt: skip
    return rows


def measured(config: NVAEConfig, batch: int, device: torch.device, checkout: Checkout | None,
             say: Callable[[str], None]) -> Found:  # fmt: skip
    """By running the step."""
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch))
    given = contenders(config, device)
    ours, exact = given["ours:auto"], given.pop("exact")
    steps = {}
    for mode in MEMORY:
        steps[f"ours:{mode}"] = own = Step(
            copy.deepcopy(ours.model), copy.deepcopy(ours.spectral), ours.x, ours.noise, ours.impl
        )
        own.model.set_memory(mode)
    steps |= {name: given[name] for name in EAGER}
    if checkout and (rival := checkout.step(ours, ours.dtype, say)):
        steps["nvlabs"] = rival
    checks = check_all(steps, exact)
    del given, ours, exact
    found: Found = {}
    for name in list(steps):
        step = steps.pop(name)  # its memory goes before the next one's
        step()
        step.optimizer.zero_grad(set_to_none=True)
        weights = [*step.model.parameters(), *step.model.buffers()]
        state = sum(t.nbytes for t in weights) + 2 * sum(p.nbytes for p in step.model.parameters())
        found[name] = state + peak_bytes(step, device), checks[name], dtype_name(step.dtype)
    return found


def by_tracing(config: NVAEConfig, batches: tuple[int, int]) -> list[Found]:
    """By `nvae_fast.estimate`; nothing is checked, for there are no numbers."""
    ours = Tracer(config)
    feet = {f"ours:{mode}": ours.footprint(mode, batches[0]) for mode in MEMORY}
    for name, layout in EAGER.items():
        feet[name] = Tracer(config, rival=plain, layout=layout).footprint("balanced", batches[0])
    return [{name: (f.at(n), None, "float32") for name, f in feet.items()} for n in batches]


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of one configuration; ratios are to ours at the same batch in the default mode, "balanced"."""
    how = "traced: it would not fit here" if rows[0]["traced"] else "measured"
    yield f"{rows[0]['case']}  ({how}; largest batch within {rows[0]['budget_bytes'] / 2**30:.1f} GiB)"
    for row in rows:
        ours = next(r for r in rows if r["impl"] == "ours:balanced" and r["shape"] == row["shape"])
        wrong = [r for r in (row, ours) if r["check"] is not None and not r["check"]["ok"]]
        ratio = "numbers not ok" if wrong else f"{row['peak_bytes'] / ours['peak_bytes']:6.2f}x"
        yield (
            f"  {row['impl']:20s}  batch {row['shape'][0]:5d}  {row['peak_bytes'] / 2**20:10.1f} MiB  {ratio}  "
            f"{row['per_image_bytes'] / 2**20:8.2f} MiB an image  largest batch {row['largest_batch']}"
        )


def save_plot(rows: list[Row], path: Any) -> None:
    """A PNG of memory against batch, one line for each contender, up to the budget."""
    from matplotlib.figure import Figure

    from nvae_fast.checkpoint.files import atomic_write

    cases = list(dict.fromkeys(row["case"] for row in rows))
    if not cases:
        raise InputError("no rows to draw")
    figure = Figure(figsize=(7, 4.2 * len(cases)), layout="constrained")
    for panel, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        own = [row for row in rows if row["case"] == case]
        for name in dict.fromkeys(row["impl"] for row in own):
            first, second = (row for row in own if row["impl"] == name)
            end = max(second["shape"][0], first["largest_batch"] or 0)
            batches = [first["shape"][0], second["shape"][0], end]
            last = second["peak_bytes"] + (end - second["shape"][0]) * first["per_image_bytes"]
            gib = [n / 2**30 for n in (first["peak_bytes"], second["peak_bytes"], last)]
            style = {"color": "#1f6fb4" if name.startswith("ours") else "#808080"}
            panel.plot(batches, gib, **style, linewidth=1)
            panel.plot(batches[:2], gib[:2], "o", **style)
            panel.annotate(f"{name} ({first['largest_batch']})", (end, gib[-1]), fontsize=8)
        panel.axhline(own[0]["budget_bytes"] / 2**30, linestyle=":", color="black", linewidth=1)
        panel.set(xlabel="batch", ylabel="GiB", title=f"{case}: a training step; in brackets what fits the budget")
        panel.title.set_fontsize(9)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
