"""A run as one HTML file that needs nothing else: curves, KL by group, pictures, scores, configuration, environment."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nvae_fast.charts import Series, bar_chart, line_chart, number
from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.errors import InputError

STYLE = """
:root { --page: #fcfcfb; --ink: #1b1b1a; --muted: #63625d; --grid: #e4e3de; --axis: #a9a8a1; --one: #2667c9; --two: #b8560b;
  --card: #f4f3ef; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #171716; --ink: #efeee8; --muted: #a8a79f; --grid: #33322e;
  --axis: #6a6963; --one: #74a9f5; --two: #ee9a52; --card: #22211f; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1080px;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; } h3 { font-size: .95rem; margin: 0; }
.muted, figcaption { color: var(--muted); } .charts { display: grid; gap: 1.2rem; }
@media (min-width: 760px) { .charts { grid-template-columns: 1fr 1fr; } }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; } .figures div { background: var(--card); border-radius: 6px;
  padding: .6rem 1rem; } .figures b { display: block; font-size: 1.3rem; }
figure { margin: 0; } img { image-rendering: pixelated; max-width: 100%; } svg { width: 100%; height: auto; }
svg text { fill: var(--muted); font: 12px system-ui, sans-serif; } svg .value { fill: var(--ink); }
.grid { stroke: var(--grid); } .axis { stroke: var(--axis); } .bar, .dot-1 { fill: var(--one); } .dot-2 { fill: var(--two); }
circle { stroke: var(--page); stroke-width: 1.5; } .series-1, .series-2 { fill: none; stroke-width: 2; stroke-linejoin: round; }
.series-1 { stroke: var(--one); } .series-2 { stroke: var(--two); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.tables { display: flex; flex-wrap: wrap; gap: 2.5rem; }
th { text-align: left; font-weight: 600; } td, th { padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--grid); }
"""

CURVES = (  # title, unit, then (name, event, field) of each line
    ("Loss", "nats", ("training loss", "train", "loss"), ("validation -ELBO", "valid", "nelbo")),
    ("Reconstruction", "nats", ("training", "train", "recon"), ("validation", "valid", "recon")),
    ("KL", "nats", ("training", "train", "kl"), ("validation", "valid", "kl")),
    ("KL coefficient", "", ("coefficient", "train", "kl_coeff")),
    ("Learning rate", "", ("rate", "train", "lr")),
    ("Spectral regulariser", "", ("sum of singular values", "train", "spectral")),
    ("Gradient norm", "", ("norm", "train", "grad_norm")),
    ("Peak memory", "MiB", ("memory", "train", "peak_memory")),
)
SCALE = {"peak_memory": 2**-20}


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder to `out` (None: report.html in it) and return its path.

    What the folder lacks is left out. InputError when it holds neither metrics.jsonl nor config.json nor evaluation.json.
    """
    run = Path(run)
    out = Path(out) if out is not None else run / "report.html"
    page = report(run)
    atomic_write(out, lambda file: file.write(page.encode()))
    return out


def report(run: Path) -> str:
    """The page for a run folder."""
    if not run.is_dir():
        raise InputError(f"no run at '{run}': give the folder that nvae-fast train wrote (its --out)")
    lines = read_metrics(run / "metrics.jsonl")
    config, scores = _json(run / "config.json"), _json(run / "evaluation.json")
    if not lines and not config and not scores:
        raise InputError(f"'{run}' holds no run: expected metrics.jsonl, config.json or evaluation.json in it")
    valid = [line for line in lines if line.get("event") == "valid"]
    name = str(config.get("name") or run.resolve().name)
    parts = [f"<h1>{escape(name)}</h1><p class=muted>{escape(_summary(config, lines))}</p>"]
    parts += [_figures(valid, scores), _curves(lines), _groups(valid, scores), _pictures(run), _scores(scores)]
    parts += [_configuration(config), _environment()]
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(name)}: nvae_fast report</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; lines that are not objects with a step (a kill in the middle of one) are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), (int, float)):
            lines.append(values)
    return lines


def _summary(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> str:
    size, training = config.get("image_size"), config.get("training") or {}
    facts = []
    if isinstance(size, list) and isinstance(training, dict):
        facts.append(f"{config.get('channels')}x{'x'.join(map(str, size))} images of {training.get('data')}")
        facts.append(f"batch {training.get('batch_size')}, {training.get('epochs')} epochs")
    if lines:
        facts.append(f"{int(max(line['step'] for line in lines)):,} steps trained")
    return ", ".join(facts)


def _figures(valid: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> str:
    """The few numbers to look at first."""
    shown = []
    if _number(scores.get("neg_log_p")) and _number(scores.get("neg_log_p_bpd")):
        k = scores.get("num_iw_samples")
        shown.append((f"-log p(x), {k} samples", _with_error(scores, "neg_log_p"), "nats"))
        shown.append(("the same per dimension", f"{scores['neg_log_p_bpd']:.4f}", "bits/dim"))
    if valid and _number(valid[-1].get("nelbo")):
        best = min(line["nelbo"] for line in valid if _number(line.get("nelbo")))
        shown.append(("validation -ELBO, last", f"{valid[-1]['nelbo']:.2f}", "nats"))
        shown.append(("validation -ELBO, best", f"{best:.2f}", "nats"))
    for label, value in _distances(scores).items():
        shown.append((f"{label}, temperature {value.get('temperature')}", number(value["value"]), ""))
    cards = "".join(f"<div>{escape(t)}<b>{escape(v)}</b><span class=muted>{escape(u)}</span></div>" for t, v, u in shown)
    return f"<div class=figures>{cards}</div>" if cards else ""


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    charts = []
    for title, unit, *wanted in CURVES:
        series = []
        for name, event, field in wanted:
            scale = SCALE.get(field, 1)
            points = [(line["step"], _scaled(line.get(field), scale)) for line in lines if line.get("event") == event]
            series.append(Series(name, points, dots=event == "valid" and len(points) <= 60))
        if chart := line_chart(series, "step", title, from_zero=unit == "MiB"):
            unit = f" <span class=muted>({unit})</span>" if unit else ""
            charts.append(f"<figure><h3>{title}{unit}</h3>{chart}</figure>")
    return f"<h2>Training</h2><div class=charts>{''.join(charts)}</div>" if charts else ""


def _groups(valid: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> str:
    source = scores if scores.get("kl_groups") else valid[-1] if valid else {}
    groups, active = source.get("kl_groups"), source.get("active_by_group")
    if not isinstance(groups, list) or not all(map(_number, groups)):
        return ""
    rows = []
    for i, value in enumerate(groups):
        units = f", {active[i]} active" if isinstance(active, list) and i < len(active) else ""
        rows.append((f"group {i}", value, f"{value:.2f}{units}"))
    caption = "Nats per image, top-down: group 0 is the smallest. A channel is active when its KL exceeds 0.1 nats."
    return (
        f"<h2>KL by latent group</h2><figure>{bar_chart(rows, 'KL by latent group')}<figcaption>{caption}</figcaption></figure>"
    )


def _pictures(run: Path) -> str:
    found = []
    for what in ("samples", "reconstructions"):
        latest = sorted(run.glob(f"samples/epoch-*-{what}.png"))[-1:]
        for path in [*latest, run / f"{what}.png"]:
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if content.startswith(b"\x89PNG"):
                data = base64.b64encode(content).decode()
                name = escape(path.relative_to(run).as_posix())
                image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
                found.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    return f"<h2>Pictures</h2><div class=charts>{''.join(found)}</div>" if found else ""


def _scores(scores: Mapping[str, Any]) -> str:
    rows = []
    where = f"{scores.get('images')} images of {scores.get('data')} ({scores.get('split')})"
    for key, what in (("nelbo", "-ELBO"), ("neg_log_p", f"-log p(x), {scores.get('num_iw_samples')} samples")):
        if _number(scores.get(key)) and _number(scores.get(f"{key}_bpd")):
            rows.append((what, f"{_with_error(scores, key)} nats, {scores[f'{key}_bpd']:.4f} bits/dim", where))
    for label, d in _distances(scores).items():
        error = f" +- {number(d['standard_error'])}" if _number(d.get("standard_error")) else ""
        how = f"{d.get('samples')} samples at temperature {d.get('temperature')} against {d.get('reference_images')} images"
        rows.append((label, number(d["value"]) + error, how + (", BN re-adjusted" if d.get("readjusted_bn") else "")))
    return f"<h2>Evaluation</h2>{_table(rows)}" if rows else ""


def _configuration(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    training = config.get("training")
    tables = [{k: v for k, v in config.items() if k != "training"}, training if isinstance(training, dict) else {}]
    return "<h2>Configuration</h2><div class=tables>" + "".join(_table(list(t.items())) for t in tables if t) + "</div>"


def _environment() -> str:
    from nvae_fast.env import environment

    facts = environment()
    rows = [*facts["versions"].items(), *facts["devices"].items(), ("threads", facts["threads"]["torch"])]
    note = "<p class=muted>Of the machine that wrote this page.</p>"
    return f"<h2>Environment</h2>{note}{_table(rows)}"


def _table(rows: Sequence[Sequence[Any]]) -> str:
    body = "".join(
        f"<tr><th>{escape(str(first))}</th>{''.join(f'<td>{escape(str(cell))}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<table>{body}</table>"


def _distances(scores: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = scores.get("distances")
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, dict) and _number(v.get("value"))}


def _with_error(scores: Mapping[str, Any], name: str) -> str:
    error = scores.get(f"{name}_se")
    return f"{scores[name]:.2f}" + (f" +- {error:.2f}" if _number(error) else "")


def _scaled(value: Any, scale: float) -> float | None:
    return value * scale if _number(value) else None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
