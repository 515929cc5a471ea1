"""`make gpu`, rehearsed on the CPU as far as it goes: sections, their failures, resuming, the table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def gpu():
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_command(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--commit",
        "abc",
        "--out",
        tmp_path,
        "--device",
        "cpu",
        "--sections",
        "environment,check",
    ]
    first = subprocess.run(command, capture_output=True, text=True)
    document = json.loads((tmp_path / "abc.json").read_text())
    assert document["commit"] == "abc" and document["device"] == "cpu"
    assert len(document["rows"]) > 100 and all(row["check"]["ok"] and row["same_bits"] for row in document["rows"])
    states = {s["section"]: s for s in document["sections"]}
    assert states["check"]["ok"]
    assert first.returncode == (0 if states["environment"]["ok"] else 1)
    assert "checks against float64, 0 failed" in (tmp_path / "abc.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True)
    assert "check        done before" in again.stdout


def test_sections_fail_alone_and_say_why(gpu, tmp_path, monkeypatch):
    python = [sys.executable, "-c"]
    sections = {
        "good": (30, [[*python, "print('fine')"]]),
        "missing": (30, [["no-such-program"]]),
        "bad": (30, [[*python, "print('first'); raise SystemExit('the last line')"]]),
        "slow": (1, [[*python, "import time; time.sleep(30)"]]),
    }
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    states = {name: gpu.run_section(name, tmp_path, device="cpu", rounds=3) for name in sections}
    assert [s["ok"] for s in states.values()] == [True, False, False, False]
    assert states["missing"]["why"] == "'no-such-program' is not installed"
    assert states["bad"]["why"] == "exit code 1: the last line"
    assert states["slow"]["why"] == "still running after 1 s"
    text = gpu.table(gpu.collect(tmp_path, states, "abc"))
    assert "| slow | still running after 1 s |" in text


def test_no_ratio_beside_wrong_numbers(gpu):
    row = {"suite": "ops", "case": "c", "phase": "fwd", "copy_share": 0.5, "peak_bytes": None, "launches": 3}
    rows = [row | {"impl": "ours:cuda", "median_ms": 1.0, "check": {"ok": True}},
            row | {"impl": "eager", "median_ms": 2.0, "check": {"ok": True}},
            row | {"impl": "compile", "median_ms": 4.0, "check": {"ok": False}}]  # fmt: skip
    text = gpu.table({"commit": "abc", "sections": [], "rows": rows})
    assert "| eager | 2 | 50% |  | 3 | 2.00 |" in text and "| compile | 4 | 50% |  | 3 | numbers not ok |" in text


def test_the_sections_fit_into_nine_minutes(gpu):
    assert sum(limit for limit, _ in gpu.SECTIONS.values()) <= 9 * 60
