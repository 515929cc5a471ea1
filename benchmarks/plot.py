"""Bars of a run: a row of panels for each case, one panel for each phase; below them the roofline of the ops.

`python -m nvae_fast.benchmarks.plot RESULTS.json FILE.png` draws a run that was kept, what it has of memory into
FILE.memory.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nvae_fast.benchmarks import memory, roofline
from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.errors import InputError

TITLES = {"fwd": "forward", "fwd_bwd": "forward and backward", "step": "training step", "sample": "sampling"}
OURS, REFERENCE, RIVAL = "#1f6fb4", "#8fb8dc", "#b0b0b0"


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'nvae_fast[plot]', or leave --plot out") from None


def save_plot(document: dict[str, Any], path: str | Path) -> None:
    """A PNG of every row: solid to the best round, pale from there to the median, which is written beside the bar."""
    from matplotlib.figure import Figure

    rows = document["rows"]
    if rows[0]["suite"] == "memory":
        memory.save_plot(rows, path)
        return
    cases = list(dict.fromkeys(row["case"] for row in rows))
    phases = {case: list(dict.fromkeys(r["phase"] for r in rows if r["case"] == case)) for case in cases}
    columns = max(map(len, phases.values()))
    bars = [max(sum(r["case"] == case and r["phase"] == phase for r in rows) for phase in phases[case]) for case in cases]
    under = roofline.points(rows) if document.get("rates") else []
    heights = [0.9 + sum(0.24 * n + 0.62 for n in bars), *([5.0] if under else [])]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    upper, *lower = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = upper.subplots(len(cases), columns, squeeze=False, height_ratios=bars)
    for line, case in zip(axes, cases, strict=True):
        for panel in line[len(phases[case]) :]:
            panel.set_visible(False)
        for panel, phase in zip(line, phases[case], strict=False):
            _draw(panel, [r for r in rows if r["case"] == case and r["phase"] == phase], labels=phase == phases[case][0])
            panel.set_title(TITLES[phase], loc="right", fontsize=9)
        line[0].set_title(case, loc="left", fontsize=9, fontweight="bold")
    threads = f"{document['threads']} thread{'s' if document['threads'] > 1 else ''}"
    figure.suptitle(f"ms: best round (solid) to median; {document['cpu']}, {threads}, torch {document['torch']}", fontsize=9)
    for part in lower:
        roofline.draw(part.subplots(), under, document["rates"])
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save_all(document: dict[str, Any], path: Path) -> list[Path]:
    """Pictures of a document of several suites: `path`, and beside it that of memory. Returns those that it wrote."""
    kinds = {
        path: lambda r: r["suite"] not in ("memory", "check"),
        path.with_suffix(".memory.png"): lambda r: r["suite"] == "memory",
    }
    drawn = {file: [r for r in document["rows"] if wanted(r)] for file, wanted in kinds.items()}
    for file, rows in drawn.items():
        if rows:
            save_plot(document | {"rows": rows}, file)
    return [file for file, rows in drawn.items() if rows]


def _draw(panel: Any, rows: list[dict[str, Any]], *, labels: bool) -> None:
    names = [row["impl"] for row in rows]
    colours = [REFERENCE if n == "ours:reference" else OURS if n.startswith("ours:") else RIVAL for n in names]
    medians, best = ([row[key] for row in rows] for key in ("median_ms", "min_ms"))
    panel.barh(range(len(rows)), medians, height=0.72, color=colours, alpha=0.4)
    panel.barh(range(len(rows)), best, height=0.72, color=colours)
    for i, row in enumerate(rows):
        wrong = "" if row["check"]["ok"] else " (numbers not ok)"
        panel.text(row["median_ms"], i, f" {row['median_ms']:.3g}{wrong}", va="center", fontsize=8)
    panel.set_yticks(range(len(rows)), names if labels else [""] * len(rows), fontsize=8)
    panel.set_xlim(0, 1.42 * max(medians))
    panel.invert_yaxis()
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    print(*save_all(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])), sep="\n")
