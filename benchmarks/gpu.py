"""Everything that a machine with a GPU should say of a commit, in one command: `make gpu COMMIT=<id>`.

Builds the package there, then runs each section in a process of its own with a time limit: a section that fails or hangs costs
the others nothing, and one that was done for this commit is not run again. Needs Python, torch and nvcc; no network, no git.
Writes <commit>.json, <commit>.md, pictures where there is matplotlib, and all of it with the sections' logs as <commit>.tar.gz
into the folder --out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "nvae_fast.cli"]
PIP = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
MEASURE = ["--device", "{device}", "--rounds", "{rounds}"]
SANITIZE = [*CLI, "bench", "--suite", "check", "--case", "depthwise/3x20x7x5", "--device", "{device}"]


def suite(name: str, file: str, *flags: str) -> list[list[str]]:
    """The command that measures a suite into <out>/<file>.json."""
    return [[*CLI, "bench", "--suite", name, *MEASURE, *flags, "--json", f"{{out}}/{file}.json"]]


# A published model shortened, so that a float64 truth and every contender take seconds.
SHORT = ["--preset", "cifar10", "--layers", "4", "--no-compile"]
# name: (seconds it may take, in all nine minutes at most; commands, run until one fails; {out} is the sections' folder, and
# {nvlabs} stands for --nvlabs PATH, or nothing)
SECTIONS: dict[str, tuple[int, list[list[str]]]] = {
    "build": (120, [PIP]),
    "environment": (15, [["nvidia-smi"], [sys.executable, "-m", "nvae_fast.env"]]),
    "check": (55, [[*CLI, "bench", "--suite", "check", "--device", "{device}", "--json", "{out}/check.json"]]),
    "memcheck": (30, [["compute-sanitizer", "--error-exitcode", "1", "--tool", "memcheck", *SANITIZE]]),
    "racecheck": (30, [["compute-sanitizer", "--error-exitcode", "1", "--tool", "racecheck", *SANITIZE]]),
    "ops": (70, suite("ops", "ops")),
    "cell": (45, suite("cell", "cell")),
    "max_autotune": (45, suite("cell", "max_autotune", "--case", "inverted_residual", "--max-autotune")),
    "step": (30, suite("step", "step", "--no-compile", "{nvlabs}")),
    "step_bf16": (40, suite("step", "step_bf16", *SHORT, "--batch-size", "32", "--precision", "bf16", "{nvlabs}")),
    "sampling": (25, suite("sampling", "sampling", *SHORT, "--batch-size", "16", "{nvlabs}")),
    "memory": (25, suite("memory", "memory", *SHORT, "--batch-size", "16", "{nvlabs}")),
    "optimizer": (10, suite("optimizer", "optimizer")),
}  # fmt: skip


def run_section(name: str, out: Path, *, nvlabs: Path | None = None, **values: object) -> dict[str, object]:
    """Its commands, their output in <out>/<name>.log; whether they succeeded, why not, and the seconds they took."""
    limit, commands = SECTIONS[name]
    environment = os.environ | {
        "NVAE_FAST_BUILD": "cuda" if values["device"] == "cuda" else "cpu",
        "PIP_BREAK_SYSTEM_PACKAGES": "1",
    }
    start, why = time.monotonic(), None
    with open(out / f"{name}.log", "wb") as log:
        for command in commands:
            checkout = ["--nvlabs", str(nvlabs.resolve())] if nvlabs else []
            words = [w for word in command
                     for w in (checkout if word == "{nvlabs}" else [word.format(out=out, **values)])]  # fmt: skip
            if shutil.which(words[0]) is None:
                why = f"'{words[0]}' is not installed"
                break
            left = limit - (time.monotonic() - start)
            try:
                code = subprocess.run(
                    words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=left
                ).returncode
            except subprocess.TimeoutExpired:
                why = f"still running after {limit} s"
                break
            if code:
                lines = (out / f"{name}.log").read_text(errors="replace").strip().splitlines() or [""]
                why = f"exit code {code}: {lines[-1]}"
                break
    return {"section": name, "ok": why is None, "why": why, "seconds": round(time.monotonic() - start, 1)}


def collect(out: Path, states: dict[str, dict], commit: str) -> dict:
    """One document of all rows: the facts of the first that has any."""
    document: dict = {"commit": commit, "sections": list(states.values()), "rows": []}
    for name in states:
        file = out / f"{name}.json"
        if file.is_file():
            part = json.loads(file.read_text())
            document["rows"] += [row | {"section": name} for row in part.pop("rows")]
            document = part | {key: value for key, value in document.items() if value is not None}
    document["commit"] = commit
    return document


def table(document: dict) -> str:
    """Markdown: the sections, the checks that failed, and ours beside every rival."""
    lines = [f"# {document.get('device', 'no device')}, commit {document['commit']}", ""]
    lines += [f"torch {document.get('torch')}, triton {document.get('triton')}, {document.get('date')}", ""]
    lines += ["| section | | seconds |", "|---|---|---|"]
    lines += [f"| {s['section']} | {'done' if s['ok'] else s['why']} | {s['seconds']} |" for s in document["sections"]]
    checks = [r for r in document["rows"] if r["suite"] == "check"]
    wrong = [r for r in checks if not (r["check"]["ok"] and r["same_bits"])]
    lines += ["", f"{len(checks)} checks against float64, {len(wrong)} failed.", ""]
    lines += [f"- {r['case']} {r['layout']} {r['impl']} {r['phase']}: {r['check']}" for r in wrong]
    timed = [r for r in document["rows"] if r["suite"] not in ("check", "memory")]
    if timed:
        lines += [
            "",
            "| case | phase | implementation | median ms | share of copy rate | MiB | launches | GPU busy | times ours |",
            "|" + "---|" * 9,
        ]
    for row in timed:
        ours = next(r for r in timed if all(r.get(k) == row.get(k) for k in ("section", "case", "phase")))
        cells = [
            row["case"], row["phase"], row["impl"], f"{row['median_ms']:.4g}",
            "" if row["copy_share"] is None else f"{row['copy_share']:.0%}",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
            "" if row["launches"] is None else str(row["launches"]),
            "" if row["busy_share"] is None else f"{row['busy_share']:.0%}",
            ratio(row, ours, "median_ms"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    held = [r for r in document["rows"] if r["suite"] == "memory"]
    if held:
        lines += ["", "| case | batch | implementation | MiB | largest batch | times ours:balanced |", "|" + "---|" * 6]
    for row in held:
        same = [r for r in held if (r["case"], r["shape"]) == (row["case"], row["shape"])]
        ours = next(r for r in same if r["impl"] == "ours:balanced")
        cells = [
            row["case"], str(row["shape"][0]), row["impl"], f"{row['peak_bytes'] / 2**20:.1f}",
            f"{row['largest_batch']} in {row['budget_bytes'] / 2**30:.0f} GiB{', traced' if row['traced'] else ''}",
            ratio(row, ours, "peak_bytes"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(document: dict, path: Path) -> list[Path]:
    """The pictures that could be drawn, in a process of its own: this one must not import what it builds."""
    file = path.with_suffix(".json")
    command = [sys.executable, "-m", "nvae_fast.benchmarks.plot", str(file), str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True) if document["rows"] else None
    if done is None or done.returncode:
        why = "nothing was measured" if done is None else (done.stderr.strip().splitlines() or ["?"])[-1]
        print(f"no pictures: {why}; python -m nvae_fast.benchmarks.plot {file} {path} draws them elsewhere", flush=True)
        return []
    return [Path(line) for line in done.stdout.split()]


def ratio(row: dict, ours: dict, key: str) -> str:
    """How many times ours; words where the numbers of either are wrong. Traced rows have none."""
    right = all(r["check"] is None or r["check"]["ok"] for r in (row, ours))
    return f"{row[key] / ours[key]:.2f}" if right else "numbers not ok"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", required=True, help="what is measured: results carry its name")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which, by comma [all]")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu rehearses [cuda]")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--nvlabs", type=Path, metavar="PATH", help="a checkout of NVlabs/NVAE, to be measured beside ours")
    args = parser.parse_args()
    names = args.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"--sections: {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    work = (args.out / f"{args.commit}.sections").resolve()
    work.mkdir(parents=True, exist_ok=True)
    done = work / "done.json"
    states = json.loads(done.read_text()) if done.is_file() else {}
    for name in names:
        if states.get(name, {}).get("ok"):
            print(f"{name:12s} done before", flush=True)
            continue
        states[name] = run_section(name, work, nvlabs=args.nvlabs, device=args.device, rounds=args.rounds)
        done.write_text(json.dumps(states))
        print(f"{name:12s} {'done' if states[name]['ok'] else states[name]['why']} ({states[name]['seconds']} s)", flush=True)
    document = collect(work, states, args.commit)
    (args.out / f"{args.commit}.json").write_text(json.dumps(document, indent=1))
    (args.out / f"{args.commit}.md").write_text(table(document))
    pictures = draw(document, args.out / f"{args.commit}.png")
    with tarfile.open(args.out / f"{args.commit}.tar.gz", "w:gz") as archive:
        for file in (args.out / f"{args.commit}.json", args.out / f"{args.commit}.md", *pictures, *sorted(work.glob("*.log"))):
            archive.add(file, file.name)
    print(f"{args.out / args.commit}.md")
    return 0 if all(state["ok"] for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
