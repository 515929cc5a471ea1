"""The README's tables are those of the newest results; what goes into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nvae_fast.benchmarks import readme
from nvae_fast.errors import InputError

ROOT = Path(__file__).parents[2]


def row(impl, ms, ok=True, **changes):
    return {
        "suite": "ops", "case": "flow_cell/2x4x6x6/float32", "op": "flow_cell", "shape": [2, 4, 6, 6], "dtype": "float32",
        "impl": impl, "phase": "fwd_bwd", "median_ms": ms, "min_ms": ms / 2, "images_per_s": 2e3 / ms,
        "peak_bytes": int(100 * ms), "check": {"ok": ok},
    } | changes  # fmt: skip


def document(*rows, device="cpu", date="2030-01-02T03:04:05+00:00", commit="abcdef0123456789"):
    facts = {"cpu": "some CPU", "threads": 2, "torch": "2.13.0", "device": device, "date": date, "commit": commit}
    return facts | {"rows": list(rows)}


def test_the_readme_holds_what_the_newest_results_say():
    text = (ROOT / "README.md").read_text()
    new = readme.block(readme.newest(ROOT / "benchmarks" / "results"))
    assert readme.inserted(text, new) == text, "run `make readme`"
    assert "| training step, `demo`" in new and "commit" in new


def test_ratios_images_and_memory():
    text = readme.block(
        [document(row("ours:cpu", 2.0), row("eager_channels_last", 5.0), row("eager", 8.0), row("eager_loop", 9.0))]
    )
    assert "some CPU, 2 threads, torch 2.13.0, 2030-01-02, commit abcdef012" in text and readme.NO_GPU in text
    assert "| `flow_cell` [2, 4, 6, 6] | 2 (1) |  | 2.5x | 4.0x |  | loop over matrices 4.5x | 0.40 |" in text
    step = dict(phase="step", op="train_step", case="demo", suite="step", dtype="bfloat16")
    text = readme.block([document(row("ours:auto", 2.0, **step), row("eager", 8.0, **step))])
    assert "| training step, `demo`, batch 2, bfloat16 | 2 (1) | 1000 |  | 4.0x |  |  |  |" in text


def test_wrong_numbers_have_no_ratio():
    text = readme.block([document(row("ours:cpu", 2.0), row("eager", 8.0, ok=False))])
    assert "2 (1)" in text and "4.0x" not in text
    text = readme.block([document(row("ours:cpu", 2.0, ok=False), row("eager", 8.0))])
    assert "numbers not ok" in text and "4.0x" not in text


def test_a_gpu_comes_first_and_ends_the_line_about_none():
    both = [document(row("ours:cpu", 2.0)), document(row("ours:triton", 1.0), device="NVIDIA H200")]
    text = readme.block(both)
    assert text.index("NVIDIA H200") < text.index("some CPU") and readme.NO_GPU not in text


def test_memory_has_a_table_of_its_own():
    facts = dict(suite="memory", case="memory/demo", phase="step", op="train_step", median_ms=None, per_image_bytes=2**20,
                 largest_batch=7, budget_bytes=2**33)  # fmt: skip
    traced, run = ({"peak_bytes": 2**21, "traced": t} for t in (True, False))
    text = readme.block([document(row("ours:low", 1, **facts, **run), row("eager", 1, **facts, **traced, check=None))])
    assert "| `demo`, ours:low | 2 | 2.0 | 1.0 | 8 GiB: 7 | measured |" in text
    assert "| traced |" in text and "ours, ms" not in text


def test_the_newest_of_each_device(tmp_path):
    files = {
        "a/1.json": document(commit="old", date="2030-01-01"), "a/2.json": document(commit="new", date="2030-01-02"),
        "a/3.json": document(commit="new", date="2030-01-03"),
        "b/1.json": document(commit="gpu", date="2029-01-01", device="GPU"),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    assert [d["commit"] for d in readme.newest(tmp_path)] == ["new", "new", "gpu"]


def test_the_command(tmp_path, capsys):
    results, page = tmp_path / "r.json", tmp_path / "README.md"
    results.write_text(json.dumps(document(row("ours:cpu", 2.0))))
    page.write_text(f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n")
    assert readme.main([str(results)]) == 0
    text = capsys.readouterr().out
    assert readme.main([str(results), "--write", str(page)]) == 0
    assert page.read_text() == f"# Title\n\n{readme.BEGIN}\n{text}{readme.END}\n\nrest\n"


@pytest.mark.parametrize("content", ["[]", "no json", "{}"])
def test_files_without_results_are_one_line(tmp_path, capsys, content):
    (tmp_path / "r.json").write_text(content)
    assert readme.main([str(tmp_path / "r.json")]) == 2
    assert "holds no results of `nvae-fast bench --json`" in capsys.readouterr().err
    with pytest.raises(InputError, match="once each, in this order"):
        readme.inserted("nothing here", "new")
