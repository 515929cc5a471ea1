"""The suites of whole models and of the optimiser, on a model of one cell of a kind. Times are never asserted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from norms import needs_native
from own_conv import on_cpu

from nvae_fast.benchmarks import memory, optimizer, report, sampling, steps, suite
from nvae_fast.benchmarks.cases import RECIPES, Case
from nvae_fast.benchmarks.weights import PowerIteration
from nvae_fast.cli import main
from nvae_fast.errors import InputError
from nvae_fast.model import NVAE
from nvae_fast.presets import PRESETS

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    PRESETS["demo"], image_size=(8, 8), padding=0, num_latent_scales=1, num_groups_per_scale=2, num_preprocess_blocks=1,
    num_postprocess_blocks=1, num_latent_per_group=4, training=dataclasses.replace(PRESETS["demo"].training, batch_size=4),
)  # fmt: skip


def test_layers_and_batch_shorten_a_preset_and_its_name_says_so():
    for name, groups in (("cifar10", 2), ("ffhq256", 1)):
        config = steps.shrunk(PRESETS[name], 1, 3)
        assert config.name == f"{name}/layers1/batch3" and config.training.batch_size == 3
        assert max(config.groups_per_scale) == groups and not config.vanilla
        assert config.num_cell_per_cond_enc == config.num_preprocess_cells == 1
        assert len(config.latent_shapes) < len(PRESETS[name].latent_shapes)
    assert steps.shrunk(PRESETS["demo"]) == PRESETS["demo"]
    with pytest.raises(InputError, match="--layers=0 must be at least 1"):
        steps.shrunk(PRESETS["demo"], 0)


def test_sampling_is_checked_and_timed():
    rows = sampling.measure_sampling(TINY, rounds=3, device=CPU, batch=5)
    assert [row["impl"] for row in rows] == ["ours:auto", "eager_channels_last", "eager"]
    assert all(row["check"]["ok"] and row["shape"] == [5, 1, 8, 8] and row["images_per_s"] > 0 for row in rows)
    lines = list(report.table(rows))
    assert all("images/s" in line for line in lines[1:]) and "1.00x" not in lines[1]


def test_a_wrong_sample_has_no_ratio(monkeypatch):
    right = NVAE.sample
    monkeypatch.setattr(
        NVAE,
        "sample",
        lambda self, *args: right(self, *args) * (1.001 if type(self.stem).__name__ == "WeightNormConv2d" else 1),
    )
    rows = sampling.measure_sampling(TINY, rounds=3, device=CPU, batch=2)
    assert [row["check"]["ok"] for row in rows] == [False, True, True] and report.ratios(rows) == {}


def test_compile_competes_in_sampling(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    rows = sampling.measure_sampling(TINY, rounds=3, device=CPU, batch=2, compilers=["compile"])
    assert rows[-1]["impl"] == "compile" and rows[-1]["check"]["ok"] and rows[-1]["peak_bytes"] is None


@pytest.fixture(scope="module")
def measured():
    return memory.measure_memory(TINY, device=CPU, budget=2**30)


def test_memory_by_mode_and_batch(measured, tmp_path):
    peak = {(row["impl"], row["shape"][0]): row["peak_bytes"] for row in measured}
    assert {name for name, _ in peak} == {"ours:fast", "ours:balanced", "ours:low", "eager_channels_last", "eager"}
    assert all(row["check"]["ok"] and not row["traced"] for row in measured)
    for batch in (4, 8):
        assert peak["ours:low", batch] < peak["ours:balanced", batch] < peak["ours:fast", batch] < peak["eager", batch]
    for row in measured:  # a line through both batches, up to the budget
        first, second = peak[row["impl"], 4], peak[row["impl"], 8]
        assert row["per_image_bytes"] == pytest.approx((second - first) / 4, abs=1)
        assert first + (row["largest_batch"] - 4) * (second - first) / 4 <= 2**30
        assert first + (row["largest_batch"] - 3) * (second - first) / 4 > 2**30
    text = "\n".join(memory.table(measured))
    assert "measured; largest batch within 1.0 GiB" in text and "numbers not ok" not in text
    pytest.importorskip("matplotlib")
    memory.save_plot(measured, tmp_path / "m.png")
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_traced(measured, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**20)
    monkeypatch.setattr(memory, "contenders", lambda *args: pytest.fail("ran a step"))
    rows = memory.measure_memory(TINY, device=CPU, budget=2**30)
    assert all(row["traced"] and row["check"] is None for row in rows)
    for row, real in zip(rows, measured, strict=True):
        assert (row["impl"], row["shape"]) == (real["impl"], real["shape"])
        assert 0.9 < row["peak_bytes"] / real["peak_bytes"] < 1.3, row["impl"]
    assert "traced: it would not fit here" in next(memory.table(rows))


def test_the_optimisers_are_checked_and_timed():
    rows = optimizer.measure_optimizer(rounds=3, device=CPU, copy_rate=1e10, count=10)
    assert [row["impl"] for row in rows] == ["ours:auto", "eager", "adam_fused"]
    assert all(row["check"]["ok"] for row in rows) and rows[0]["case"] == "adamax/10x50000/float32"


@pytest.mark.parametrize("impl", ["ours:auto", "adam_fused"])
def test_a_wrong_optimiser_is_seen(monkeypatch, impl):
    make, rule = optimizer.RULES[impl]
    monkeypatch.setitem(optimizer.RULES, impl, (lambda p, **options: make(p, **options | {"eps": 1e-4}), rule))
    rows = optimizer.measure_optimizer(rounds=3, device=CPU, copy_rate=1e10, count=5)
    assert [row["impl"] for row in rows if not row["check"]["ok"]] == [impl]


@needs_native
def test_a_branch_competes_with_itself_around_cudnn():
    recipe, inputs = RECIPES["preact_branch"], Case("cell", "preact_branch", (2, 4, 8, 8)).inputs()
    assert not recipe.rivals(CPU)
    (other,) = recipe.rivals(torch.device("cuda")).values()
    with on_cpu(), torch.profiler.profile() as found:
        y = recipe.ours("triton", inputs)[0]
    own = "nvae_fast::conv2d_fwd"
    assert sum(event.name == own for event in found.events()) == 2
    with on_cpu(), torch.profiler.profile() as found:
        torch.testing.assert_close(other(inputs)[0], y)
    assert not any(event.name == own for event in found.events())


def test_the_loop_over_matrices_competes():
    rows = suite.measure(Case("ops", "power_iteration", (6,)), rounds=3, device=CPU, copy_rate=1e10)
    loops = [row for row in rows if row["impl"] == "eager_loop"]
    assert len(loops) == 2 and all(row["check"]["error"] <= 20 * row["check"]["budget"] for row in loops)
    inputs = Case("ops", "power_iteration", (12,)).inputs()
    for a, b in zip(PowerIteration().loop(inputs), PowerIteration().plain(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--suite", "step", "--layers", "0"], "--layers=0 must be at least 1"),
        (["--suite", "sampling", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["--suite", "memory", "--budget", "much"], "--budget=much: expected a size"),
        (["--suite", "memory", "--preset", "cifar"], "unknown preset 'cifar'"),
    ],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    assert main(["bench", *flags]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "name, case",
    [
        ("optimizer", "adamax/5x25000/float32"),
        ("sampling", "sample/tiny/layers1/2"),
        ("memory", "memory/tiny/layers1/batch2"),
        ("step", "tiny/layers1/batch2"),
    ],
)
def test_the_command_runs_every_suite(name, case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(optimizer, "COUNT", 5)
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, name="tiny"))
    file = tmp_path / "b.json"
    command = [
        "bench",
        "--suite",
        name,
        "--preset",
        "tiny",
        "--layers",
        "1",
        "--batch-size",
        "2",
        "--rounds",
        "3",
        "--no-compile",
    ]
    assert main([*command, "--device", "cpu", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {row["case"] for row in rows} == {case} and case in capsys.readouterr().out
