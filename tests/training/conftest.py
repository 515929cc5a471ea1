"""Tiny runs of the real command line, in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_processes import Processes
from safetensors.torch import load_file

from nvae_fast import NVAE, NVAEConfig
from nvae_fast.training import Trainer

MODEL = (
    "--num_channels_enc 2 --num_channels_dec 2 --num_groups_per_scale 1 --num_latent_scales 2 --num_latent_per_group 2 "
    "--num_preprocess_blocks 1 --num_postprocess_blocks 1 --num_preprocess_cells 1 --num_postprocess_cells 1 "
    "--num_cell_per_cond_enc 1 --num_cell_per_cond_dec 1"
).split()
RUN = "--preset demo --padding 0 --batch_size 16 --epochs 3 --warmup_epochs 1 --log_every 1 --no-bar --no-images".split()
"""With 54 training images: three steps an epoch, nine in all."""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small gain nothing from more, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def waves() -> Callable[..., np.ndarray]:
    """waves(count, height, width, channels): uint8 [count, height, width, channels] of smooth images."""

    def make(count: int, height: int = 16, width: int = 16, channels: int = 1) -> np.ndarray:
        y, x = np.mgrid[:height, :width]
        a, b, c = np.random.default_rng(0).uniform(0.2, 1.0, (3, count, channels, 1, 1))
        return (127.5 + 127.4 * np.sin(a * y + b * x + 6 * c)).astype(np.uint8).transpose(0, 2, 3, 1)

    return make


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory, waves) -> Path:
    """60 grey images of 16x16: 54 train, 6 validate."""
    path = tmp_path_factory.mktemp("data") / "waves.npy"
    np.save(path, waves(60))
    return path


@pytest.fixture(scope="session")
def command(images: Path) -> Callable[..., list[object]]:
    """command(out, *flags): the command line of the tiny run into `out`; later flags win."""
    return lambda out, *flags: ["train", "--data", images, "--out", out, *RUN, *MODEL, *flags]


@pytest.fixture
def train(cli, command) -> Callable[..., Any]:
    """train(out, *flags): the tiny run, in this process."""
    return lambda out, *flags: cli(*command(out, *flags))


@pytest.fixture(scope="session")
def _finished() -> dict[str, Path]:
    return {}


@pytest.fixture
def finished(train, tmp_path_factory: pytest.TempPathFactory, _finished) -> Path:
    """The folder of the tiny run, trained to its end once; not to be written to."""
    if "run" not in _finished:  # in a test, not in a session fixture: under the same settings of torch
        folder = tmp_path_factory.mktemp("finished") / "run"
        assert train(folder).code == 0
        _finished["run"] = folder
    return _finished["run"]


@pytest.fixture(scope="session")
def exportable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model that the public code could load, in a folder of its own."""
    sizes = {k: 2 for k in ("num_latent_scales", "num_latent_per_group", "num_channels_enc", "num_channels_dec")}
    cells = {f"num_{k}": 1 for k in ("groups_per_scale", "preprocess_cells", "postprocess_cells")}
    torch.manual_seed(0)
    model = NVAE(NVAEConfig.from_nvlabs_args({"dataset": "mnist", "use_se": True, "res_dist": True, **sizes, **cells}))
    folder = tmp_path_factory.mktemp("exportable") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def own_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of `finished` to damage."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def _metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory")} for line in lines]


def _latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """metrics(run): the lines of metrics.jsonl without times and memory."""
    return _metrics


@pytest.fixture(scope="session")
def latest() -> Callable[[Path], Path]:
    """latest(run): the newest checkpoint folder."""
    return _latest


@pytest.fixture(scope="session")
def same_run() -> Callable[[Path, Path], None]:
    """same_run(run, other): they agree in every number of the logs and in every bit of weights, moments, BN statistics,
    singular vectors and random state."""

    def check(run: Path, other: Path) -> None:
        assert _metrics(run) == _metrics(other)
        ours, theirs = _latest(run), _latest(other)
        assert json.loads((ours / "training.json").read_text()) == json.loads((theirs / "training.json").read_text())
        for name in ("model.safetensors", "training.safetensors"):
            mine, yours = load_file(ours / name), load_file(theirs / name)
            assert mine.keys() == yours.keys()
            for key in mine:
                assert mine[key].dtype == yours[key].dtype, key
                assert mine[key].numpy().tobytes() == yours[key].numpy().tobytes(), key

    return check


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """stop_at(step): this process gets a SIGTERM right after that step; None: not at all."""
    wanted: list[int | None] = [None]
    step = Trainer._step

    def stepping(self: Trainer, x: object) -> None:
        step(self, x)
        if self.progress.step == wanted[0]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_step", stepping)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("SIGTERM was not caught"))
    yield lambda at: wanted.__setitem__(0, at)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    server = Processes(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()
