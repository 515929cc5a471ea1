"""`nvae-fast bench` on small cases: its rows, its checks, its errors. Times are never asserted."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import pytest
import torch

from nvae_fast.benchmarks import report, steps, suite
from nvae_fast.benchmarks.cases import CASES, RECIPES, select
from nvae_fast.benchmarks.ops import DepthwiseConv
from nvae_fast.benchmarks.plot import save_plot
from nvae_fast.cli import main
from nvae_fast.errors import InputError
from nvae_fast.kernels import _impl
from nvae_fast.presets import PRESETS

from .conftest import SMALL

CPU = torch.device("cpu")
TOP = {"schema", "commit", "dirty", "date", "device", "cpu", "torch", "triton", "threads", "rates", "rows"}
ROW = (
    "suite case op shape dtype layout impl phase median_ms min_ms iqr_ms rounds images_per_s peak_bytes bytes copy_share "
    "launches busy_share check"
).split()


def measure(case, **options):
    return suite.measure(case, rounds=3, device=CPU, copy_rate=1e10, **options)


def test_the_table():
    assert {case.op for case in SMALL} == {case.op for case in CASES} == set(RECIPES)
    assert len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_recipe_says_the_same_on_both_sides(case):
    rows = measure(case)
    names = list(dict.fromkeys(row["impl"] for row in rows))
    rivals = ["ours:reference", "eager", "eager_channels_last", *case.recipe.rivals(CPU)]
    assert names[-len(rivals) :] == rivals
    assert [(row["impl"], row["phase"]) for row in rows] == [(name, phase) for phase in suite.PHASES for name in names]
    for row in rows:  # the budgets themselves are tested with the ops: here rounding has few values to be typical on
        assert row["check"]["error"] <= 20 * row["check"]["budget"], row
        assert row["peak_bytes"] > 0 and row["rounds"] == 3
        assert (row["bytes"] is None) == (row["suite"] == "cell") == (row["copy_share"] is None)


def test_inputs_follow_from_the_seed():
    first, again, other = (SMALL[0].inputs(seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.leaves, again.leaves, strict=True))
    assert not torch.equal(first.leaves[0], other.leaves[0])


@pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
def test_native_implementations_compete():
    assert suite.implementations(SMALL[1], SMALL[1].inputs()) == ["cpu", "reference"]
    assert suite.implementations(SMALL[-1], SMALL[-1].inputs()) == ["cpu", "reference"]


@pytest.mark.parametrize("planted", [lambda y: 1.01 * y, lambda y: y / 0], ids=["wrong", "not finite"])
def test_wrong_numbers_have_no_ratio(monkeypatch, planted):
    right = DepthwiseConv.ours
    monkeypatch.setattr(DepthwiseConv, "ours", lambda self, impl, inputs: [planted(y) for y in right(self, impl, inputs)])
    rows = measure(SMALL[1])
    assert {row["impl"] for row in rows if not row["check"]["ok"]} == {r["impl"] for r in rows if r["impl"].startswith("ours")}
    assert report.ratios(rows) == {}
    lines = list(report.table(rows))
    assert len(lines) == 1 + len(rows) and "x  " not in "".join(lines[1:])
    assert sum("NUMBERS: error" in line for line in lines) == sum(not row["check"]["ok"] for row in rows)
    json.dumps(rows, allow_nan=False)


def test_the_check():
    truth, off = torch.ones(4, dtype=torch.float64), torch.full((4,), 1.0 + 1e-5)
    eps = torch.finfo(torch.float32).eps
    for got, plain, ok in ((off, torch.ones(4), False), (off, off, True), (torch.ones(4), torch.ones(4), True)):
        found = suite.check([got], [[torch.ones(4)], [plain]], [truth, truth])
        plain_error = (plain.double() - truth).abs().max().item()
        assert found["ok"] is ok and found["budget"] == 2 * (plain_error + eps)
    nan = torch.full((4,), torch.nan)
    assert suite.check([nan], [[off]], [truth])["error"] is None
    assert suite.check([off], [[nan]], [truth])["ok"] is False


def test_ratios_are_to_the_first_of_ours():
    def row(impl, ms, ok=True):
        return {"impl": impl, "phase": "fwd", "median_ms": ms, "check": {"ok": ok, "error": 1.0, "budget": 1.0}}

    rows = [row("ours:cpu", 2.0), row("ours:reference", 3.0), row("eager", 1.0), row("compile", 1.0, ok=False)]
    assert report.ratios(rows) == {("fwd", "ours:reference"): 1.5, ("fwd", "eager"): 0.5}


def test_compile_competes_where_it_can(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    rows = measure(SMALL[-1], compilers=["compile"])
    mine = [row for row in rows if row["impl"] == "compile"]
    assert [row["phase"] for row in mine] == list(suite.PHASES)
    assert all(row["peak_bytes"] is None and row["layout"] == "channels_last" for row in mine)


def test_max_autotune_is_a_rival_of_its_own(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda function, mode: modes.append(mode) or function)
    rows = measure(SMALL[1], compilers=["compile", "max_autotune"])
    assert modes == [None, "max-autotune-no-cudagraphs"]
    assert [row["impl"] for row in rows if row["phase"] == "fwd"][-2:] == ["compile", "max_autotune"]


def test_where_compile_fails_a_line_says_why(monkeypatch):
    def broken(*args):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, mode: broken)
    said = []
    rows = measure(SMALL[1], compilers=["compile"], say=said.append)
    assert said == ["  no row for compile: RuntimeError: no compiler"]
    assert "compile" not in {row["impl"] for row in rows}


def test_the_command(tmp_path, capsys):
    file = tmp_path / "new" / "b.json"
    command = ["bench", "--suite", "ops", "--case", "bn_act", "--rounds", "3", "--threads", "1", "--no-compile"]
    assert main([*command, "--device", "cpu", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert set(document) == TOP and document["schema"] == report.SCHEMA and document["threads"] == 1
    assert document["commit"] is None or len(document["commit"]) == 40
    assert all(list(row) == ROW and set(row["check"]) == {"ok", "error", "budget"} for row in document["rows"])
    assert {row["case"] for row in document["rows"]} == {"bn_act/2x4x6x6/float32"}
    out = capsys.readouterr().out
    assert "bn_act/2x4x6x6/float32  (ours: channels-last)" in out and "eager_channels_last" in out


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    file = tmp_path / "b.png"
    assert main(["bench", "--case", "bn_act", "--rounds", "3", "--no-compile", "--device", "cpu", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_git_there_is_no_commit(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    facts = report.facts(CPU)
    assert facts["commit"] is None and facts["dirty"] is None


def test_select():
    assert [case.op for case in select("ops", "depthwise_conv")] == ["depthwise_conv"] * 2
    with pytest.raises(InputError, match="no case of suite 'cell' has 'bn_act' in its name: inverted_residual/2x4x6x6"):
        select("cell", "bn_act")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--suite", "opps"], "unknown suite 'opps'"),
        (["--case", "nothing"], "no case of suite 'ops' has 'nothing' in its name"),
        (["--rounds", "2"], "--rounds=2 must be at least 3"),
        (["--threads", "0"], "--threads=0 must be at least 1"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--json", "{file}/b.json"], "cannot write to '{file}/b.json'"),
        (["--json", "{folder}"], "cannot write to '{folder}': it is a folder"),
        (["--plot", "{file}/b.png"], "cannot write to '{file}/b.png'"),
        (["--plot", "b.svg"], "what is written is png, so give a name that ends in .png"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(suite, "measure", lambda *args, **kwargs: pytest.fail("measured"))
    (tmp_path / "file").touch()
    places = {"file": tmp_path / "file", "folder": tmp_path}
    assert main(["bench", *(flag.format(**places) for flag in flags)]) == 2
    captured = capsys.readouterr()
    assert words.format(**places) in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_a_plot_without_matplotlib_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", "--plot", "b.png"]) == 2
    assert capsys.readouterr().err == (
        "nvae-fast: --plot needs matplotlib: pip install 'nvae_fast[plot]', or leave --plot out\n"
    )


def test_a_training_step_is_checked_timed_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = steps.measure_step(PRESETS["demo"], rounds=3, device=CPU)
    assert [row["impl"] for row in rows] == ["ours:auto", "eager_channels_last", "eager"]
    assert all(list(row) == ROW and row["check"]["ok"] and row["rounds"] >= 3 for row in rows)
    if _impl.load_native()[0] is not None:
        assert rows[0]["peak_bytes"] <= 0.5 * rows[1]["peak_bytes"]
    save_plot(report.document(rows, CPU), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_in_a_step_is_seen():
    truth = 2.0, torch.ones(1000, dtype=torch.float64)
    plain = 2.0, truth[1] * (1 + 1e-6)
    wrong = truth[1].clone()
    wrong[7] = 0
    assert steps.check(plain, plain, truth)["ok"] and not steps.check((2.0, wrong), plain, truth)["ok"]
    assert not steps.check((2.1, truth[1]), plain, truth)["ok"]


@pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_case_has_a_native_implementation(case):
    assert suite.implementations(case, suite._converted(case.inputs(), CPU, case.layout))[0] == "cpu"
