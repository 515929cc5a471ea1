"""`make gpu`, rehearsed on the CPU as far as it goes: sections, their failures, resuming, the table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tarfile
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
    with tarfile.open(tmp_path / "abc.tar.gz") as archive:
        assert {"abc.json", "abc.md", "check.log", "environment.log"} <= set(archive.getnames())
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
    row = {"suite": "ops", "case": "c", "phase": "fwd", "copy_share": 0.5, "peak_bytes": None, "launches": 3, "busy_share": 0.9}
    rows = [row | {"impl": "ours:cuda", "median_ms": 1.0, "check": {"ok": True}},
            row | {"impl": "eager", "median_ms": 2.0, "check": {"ok": True}},
            row | {"impl": "compile", "median_ms": 4.0, "check": {"ok": False}}]  # fmt: skip
    text = gpu.table({"commit": "abc", "sections": [], "rows": rows})
    assert "| eager | 2 | 50% |  | 3 | 90% | 2.00 |" in text and "| compile | 4 | 50% |  | 3 | 90% | numbers not ok |" in text


def test_the_table_of_memory(gpu):
    row = {"suite": "memory", "case": "memory/c", "phase": "step", "traced": False, "budget_bytes": 2**30, "largest_batch": 5,
           "median_ms": None}  # fmt: skip
    rows = [row | {"impl": impl, "shape": [n, 3, 8, 8], "peak_bytes": size * n * 2**20, "check": check}
            for n in (2, 4) for impl, size, check in (("ours:fast", 6, {"ok": True}), ("ours:balanced", 4, {"ok": True}),
                                                      ("eager", 12, {"ok": True}), ("nvlabs", 13, {"ok": False}))]  # fmt: skip
    text = gpu.table({"commit": "abc", "sections": [], "rows": rows})
    assert "| memory/c | 4 | eager | 48.0 | 5 in 1 GiB | 3.00 |" in text and "| memory/c | 2 | ours:fast | 12.0 |" in text
    assert text.count("numbers not ok |") == 2
    traced = [r | {"check": None, "traced": True} for r in rows]
    assert "| 5 in 1 GiB, traced | 3.25 |" in gpu.table({"commit": "abc", "sections": [], "rows": traced})


def test_every_suite_has_a_section_whose_command_is_understood(gpu):
    from nvae_fast.benchmarks.cases import SUITES
    from nvae_fast.cli import bench
    from nvae_fast.cli.flags import Parser, underscored

    parser, seen = Parser(), set()
    bench.add_flags(parser)
    for name, (_, commands) in gpu.SECTIONS.items():
        for command in commands:
            if "bench" in command:
                words = command[command.index("bench") + 1 :]
                words = [w.format(out="o", device="cpu", rounds=3) for w in words if w != "{nvlabs}"]
                args = parser.parse_args(underscored(["bench", *words])[1:])
                bench.configuration(args)
                seen.add(args.suite)
                assert args.json in (f"o/{name}.json", None)
    assert seen == set(SUITES)


def test_the_checkout_is_measured_where_one_is_given(gpu, tmp_path, monkeypatch):
    show = [sys.executable, "-c", "import sys; print(sys.argv[1:])", "before", "{nvlabs}", "after"]
    monkeypatch.setattr(gpu, "SECTIONS", {"show": (30, [show])})
    for given, words in ((None, "['before', 'after']"), (tmp_path, f"['before', '--nvlabs', '{tmp_path}', 'after']")):
        assert gpu.run_section("show", tmp_path, nvlabs=given, device="cpu", rounds=3)["ok"]
        assert (tmp_path / "show.log").read_text().strip() == words


def test_the_sections_fit_into_nine_minutes(gpu):
    assert sum(limit for limit, _ in gpu.SECTIONS.values()) <= 9 * 60
