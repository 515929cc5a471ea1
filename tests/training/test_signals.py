"""Real processes, real signals: nothing is lost, nothing is half written."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvae_fast.checkpoint.native import load_model, load_training


def wait_for_lines(run: Path, count: int, seconds: float = 60) -> None:
    """Until metrics.jsonl has that many lines."""
    end = time.monotonic() + seconds
    path = run / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")])
def test_stop(processes, command, tmp_path, metrics, latest, number, code, name):
    argv = command(tmp_path / "run", "--epochs", 500, "--log_every", 1)
    pid = processes.start(*argv)
    wait_for_lines(tmp_path / "run", 2)
    os.kill(pid, number)
    got, err = processes.wait()
    assert got == code
    lines = err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("demo: ")  # the run; why it ended
    assert lines[1] == f"nvae-fast: stopped by {name}; state saved, continue with --resume auto"
    _, meta = load_training(latest(tmp_path / "run"))
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert meta["progress"]["step"] == steps[-1] == len(steps)

    pid = processes.start(*argv, "--resume")
    wait_for_lines(tmp_path / "run", len(steps) + 4)
    os.kill(pid, number)
    assert processes.wait()[0] == code
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_ctrl_c_before_the_first_step(train, tmp_path, monkeypatch):
    def reading(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nvae_fast.training.data.open_images", reading)
    assert train(tmp_path / "run") == (130, "", "nvae-fast: stopped by SIGINT\n")


def loadable(run: Path, latest) -> int:
    """The step of the newest checkpoint, which must be whole; 0 if there is none yet."""
    if not (run / "checkpoints" / "latest").exists():
        return 0
    load_model(latest(run))
    return load_training(latest(run))[1]["progress"]["step"]


def test_killed_while_putting_files_in_place(processes, command, train, stop_at, tmp_path, finished, same_run, latest):
    run, step = tmp_path / "run", 3
    stop_at(3)  # between the last step of an epoch and its validation: the next checkpoint is of the same step
    assert train(run).code == 143
    for count in range(1, 100, 3):
        code, err = processes.run(*command(run, "--resume"), die_at=count)
        assert code in (0, -signal.SIGKILL), err
        assert loadable(run, latest) >= step
        step = loadable(run, latest)
        if code == 0:
            break
    assert count > 15  # files, folders and names of a save, the removal of the one before
    same_run(run, finished)
    named = {(run / "checkpoints" / label).read_text().strip() for label in ("latest", "best")}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"latest", "best"} | named


KILLS = int(os.environ.get("NVAE_FAST_KILLS", "5"))  # make soak: 50


def test_killed_at_random_moments(processes, command, train, tmp_path, same_run, latest):
    """By the clock or in the middle of a save, in turn; whenever a run gets to its end it is compared and begun anew."""
    run, whole, flags = tmp_path / "run", tmp_path / "whole", ("--epochs", 4 + KILLS // 4, "--save_every", 2, "--keep", 2)
    assert train(whole, *flags).code == 0
    kills, seed, step = 0, 0, 0
    while kills < KILLS or run.exists():
        moment = random.Random(seed)
        seed += 1
        if kills == KILLS:
            code, err = processes.run(*command(run, *flags, "--resume"))
        elif seed % 2:
            pid = processes.start(*command(run, *flags, "--resume"))
            time.sleep(moment.uniform(0.1, 0.9))
            with contextlib.suppress(ProcessLookupError):  # done before
                os.kill(pid, signal.SIGKILL)
            code, err = processes.wait()
        else:
            code, err = processes.run(*command(run, *flags, "--resume"), die_at=moment.randint(1, 150))
        assert code in (0, -signal.SIGKILL), err
        kills += code != 0
        for folder in run.glob("checkpoints/step-*"):
            load_model(folder), load_training(folder)
        assert loadable(run, latest) >= step
        step = loadable(run, latest)
        if code == 0:
            same_run(run, whole)
            shutil.rmtree(run)
            step = 0
    print(f"{kills} kills in {seed} starts")


def test_the_installed_command():
    """A process of its own, as a shell starts it."""
    argv = [sys.executable, "-m", "nvae_fast.cli", "sample", os.devnull]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("nvae-fast: ") and done.stderr.count("\n") == 1
