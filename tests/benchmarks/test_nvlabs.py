"""The published code as a rival, in the place of which a stand-in with its interface runs. Times are never asserted."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from nvae_fast.benchmarks import memory, report, sampling, steps
from nvae_fast.benchmarks.nvlabs import NEEDED, Checkout, precision
from nvae_fast.cli import main
from nvae_fast.errors import InputError
from nvae_fast.presets import PRESETS

from .stand_in import FILES, write

CPU = torch.device("cpu")
SMALL = dataclasses.replace(steps.shrunk(PRESETS["demo"], 1, 2), num_channels_enc=4, num_channels_dec=4, num_latent_scales=2)


def measure_step(folder, **options):
    return steps.measure_step(SMALL, rounds=3, device=CPU, checkout=Checkout(folder), **options)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", dataclasses.replace(SMALL, name="small"))


def run(suite, folder, *flags):
    """The rows of the command on the preset `small`."""
    file, checkout = folder / "b.json", write(folder / "checkout")
    common = ["--preset", "small", "--rounds", "3", "--no-compile", "--device", "cpu"]
    assert main(["bench", "--suite", suite, *common, "--nvlabs", str(checkout), "--json", str(file), *flags]) == 0
    return json.loads(file.read_text())["rows"]


def test_it_competes_in_a_step_with_our_weights_and_noise(tmp_path, capsys):
    rows = measure_step(write(tmp_path))
    assert [row["impl"] for row in rows] == ["ours:auto", "eager_channels_last", "eager", "nvlabs"]
    last = rows[-1]
    assert last["check"]["ok"] and last["layout"] == "contiguous" and last["peak_bytes"] > 0 and last["dtype"] == "float32"
    assert ("step", "nvlabs") in report.ratios(rows) and not capsys.readouterr().out


def test_and_in_bfloat16(tmp_path):
    rows = measure_step(write(tmp_path), dtype=torch.bfloat16)
    assert {row["dtype"] for row in rows} == {"bfloat16"} and {row["case"] for row in rows} == {f"{SMALL.name}/bfloat16"}
    assert all(row["check"]["ok"] and row["check"]["budget"] > 2**-8 for row in rows)


def test_float16_has_a_loss_scale_and_a_yardstick_of_its_own(tmp_path, monkeypatch):
    """What a GPU runs, on a CPU."""
    monkeypatch.setattr("nvae_fast.benchmarks.nvlabs.precision", lambda device, dtype: torch.float16)
    checkout = Checkout(write(tmp_path))
    found = steps.contenders(SMALL, CPU)
    exact = found.pop("exact")
    found["nvlabs"] = checkout.step(found["ours:auto"], torch.float32, pytest.fail)
    assert found["nvlabs"].scaler.get_scale() == 1024
    checks = steps.check_all(found, exact)
    assert all(c["ok"] for c in checks.values()) and checks["nvlabs"]["error"] > 10 * checks["ours:auto"]["budget"]
    before = [p.clone() for p in found["nvlabs"].model.parameters()]
    found["nvlabs"]()
    assert sum(not torch.equal(a, b) for a, b in zip(before, found["nvlabs"].model.parameters(), strict=True)) > len(before) / 2
    rows = sampling.measure_sampling(SMALL, rounds=3, device=CPU, batch=2, checkout=checkout)
    assert rows[-1]["dtype"] == "float16" and rows[-1]["check"]["ok"] and rows[0]["dtype"] == "float32"


def test_a_gpu_runs_it_as_shipped():
    assert precision(torch.device("cuda"), torch.float32) == precision(torch.device("cuda"), torch.bfloat16) == torch.float16
    assert precision(CPU, torch.bfloat16) == torch.bfloat16


@pytest.mark.parametrize(
    "planted",
    [
        {"recon": "1.001 * objective.reconstruction_loss(output, x, 2)"},
        {"kl": "balanced.detach(), gamma, None"},
        {"kl": "kl_coeff * sum(kl_all), gamma, None"},
        {"recon": "objective.reconstruction_loss(output, x, 2) / 0"},
    ],
    ids=["another loss", "another gradient", "not balanced", "not finite"],
)
def test_a_wrong_step_has_no_ratio(planted, tmp_path):
    rows = measure_step(write(tmp_path, **planted))
    assert [row["check"]["ok"] for row in rows] == [True, True, True, False]
    assert ("step", "nvlabs") not in report.ratios(rows) and ("step", "eager") in report.ratios(rows)
    line = list(report.table(rows))[-1]
    assert "nvlabs" in line and "no ratio" in line and "x  " not in line
    json.dumps(rows, allow_nan=False)


def test_it_competes_in_sampling(tmp_path):
    options = {"rounds": 3, "device": CPU, "batch": 3}
    rows = sampling.measure_sampling(SMALL, checkout=Checkout(write(tmp_path / "right")), **options)
    assert rows[-1]["impl"] == "nvlabs" and rows[-1]["check"]["ok"] and rows[-1]["peak_bytes"] > 0
    wrong = Checkout(write(tmp_path / "wrong", sample="1.001 * self.inner.sample(n, t, self.draws(n))"))
    rows = sampling.measure_sampling(SMALL, checkout=wrong, **options)
    assert [row["check"]["ok"] for row in rows] == [True, True, True, False] and ("sample", "nvlabs") not in report.ratios(rows)


def test_it_competes_in_memory(tmp_path, small):
    rows = run("memory", tmp_path, "--budget", "1GB")
    mine = [row for row in rows if row["impl"] == "nvlabs"]
    assert [row["shape"][0] for row in mine] == [2, 4] and all(row["check"]["ok"] for row in mine)
    assert mine[0]["peak_bytes"] > rows[0]["peak_bytes"] and mine[0]["largest_batch"] < rows[0]["largest_batch"]


def test_it_cannot_be_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 2**20)
    monkeypatch.setattr(memory, "by_tracing", lambda config, batches: [{"ours:low": (n, None, "float32")} for n in batches])
    said = []
    rows = memory.measure_memory(SMALL, device=CPU, checkout=Checkout(write(tmp_path)), say=said.append)
    assert {row["impl"] for row in rows} == {"ours:low"}
    assert said == ["  no row for nvlabs: its step would not fit here, and cannot be traced"]


def test_code_that_fails_has_no_row_and_a_line_says_why(tmp_path):
    said = []
    rows = measure_step(write(tmp_path, recon="output.no_such_thing"), say=said.append)
    assert "nvlabs" not in {row["impl"] for row in rows} and len(rows) == 3
    assert len(said) == 1 and said[0].startswith("  no row for nvlabs: AttributeError: ") and "no_such_thing" in said[0]


def test_nothing_of_it_stays(tmp_path, monkeypatch):
    other = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", other)
    before, path = {*sys.modules}, [*sys.path]
    checkout = Checkout(write(tmp_path))
    step = checkout.step(steps.contenders(SMALL, CPU)["ours:auto"], torch.float32, pytest.fail)
    step.numbers()
    assert sys.modules["utils"] is other and sys.path == path
    assert not {name for name in {*sys.modules} - before if name.split(".")[0] in {*NEEDED, "thirdparty", "tensorboardX"}}
    assert "cuda" not in vars(nn.Module)["cuda"].__module__ and not torch.ones(1).is_cuda and "is_cuda" not in vars(Tensor)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("distributions")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted(name.split("/")[-1] for name in FILES)
    with checkout.running(CPU), pytest.raises(RuntimeError, match="on purpose"):
        raise RuntimeError("on purpose")
    assert sys.modules["utils"] is other and torch.distributed.get_world_size.__module__.startswith("torch.")


def test_every_draw_is_of_the_noise_given(tmp_path):
    text = FILES["distributions.py"]
    assert "draws noise of its own" in text
    checkout = Checkout(write(tmp_path))
    step = checkout.step(steps.contenders(SMALL, CPU)["ours:auto"], torch.float32, pytest.fail)
    first = step.numbers()[0]
    step.noise = [t + 1 for t in step.noise]
    assert step.numbers()[0] != first


@pytest.mark.parametrize(
    "broken, words",
    [
        (["utils.py", "model.py"], "is no checkout of NVlabs/NVAE: expected a folder with model.py, distributions.py, "
         "utils.py, found no model.py, utils.py; git clone https://github.com/NVlabs/NVAE"),
        ({"model.py": "import no_such_package"}, "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ({"model.py": "def"}, "cannot be imported: SyntaxError: invalid syntax"),
        ({"model.py": "AutoEncoder = 1", "utils.py": "pre_process = get_arch_cells = 1"},
         "is no checkout of NVlabs/NVAE: it lacks utils.kl_balancer_coeff, utils.kl_balancer, utils.reconstruction_loss"),
    ],
    ids=["other folder", "absent package", "no Python", "other code"],
)  # fmt: skip
def test_what_is_no_checkout_is_one_line(broken, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(steps, "measure_step", lambda *args, **kwargs: pytest.fail("measured"))
    write(tmp_path)
    for name in broken:
        (tmp_path / name).unlink()
        if isinstance(broken, dict):
            (tmp_path / name).write_text(broken[name])
    assert main(["bench", "--suite", "step", "--nvlabs", str(tmp_path), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert f"--nvlabs '{tmp_path}' " in captured.err and words in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--suite", "ops"], "--nvlabs competes in the suites step, sampling, memory, not in 'ops'"),
        (["--suite", "step", "--preset", "stacked_mnist"], "the public code has no data set of 3-channel images of (32, 32)"),
        (["--suite", "step", "--precision", "fp16"], "--precision 'fp16': expected fp32 or bf16"),
        (["--suite", "memory", "--precision", "bf16"], "--precision bf16 is of the suite step"),
    ],
)
def test_bad_flags_are_one_line(flags, words, tmp_path, capsys):
    assert main(["bench", *flags, "--nvlabs", str(write(tmp_path)), "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_another_balance_is_refused(tmp_path):
    config = dataclasses.replace(SMALL, training=dataclasses.replace(SMALL.training, kl_balance="linear"))
    with pytest.raises(InputError, match="its KL balance is 'square', that of .* is 'linear'"):
        steps.measure_step(config, rounds=3, device=CPU, checkout=Checkout(write(tmp_path)))


def test_the_command(tmp_path, small, capsys):
    for suite, more in (("step", ["--precision", "bf16"]), ("sampling", [])):
        rows = run(suite, tmp_path, *more)
        assert rows[-1]["impl"] == "nvlabs" and rows[-1]["check"]["ok"] and "nvlabs" in capsys.readouterr().out
