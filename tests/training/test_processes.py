"""Several real processes as one run, joined by gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
PARTS = ("--batch_size", 8)  # of each of two processes: the joined batches are those of the tiny run


@pytest.fixture
def ranks(processes, command):
    """ranks(out, *flags, other=flags): start two processes of the tiny run; `other` are further flags of the second."""

    def start(out, *flags, other=()):
        return processes.start_several([command(out, *PARTS, *flags), command(out, *PARTS, *flags, *other)])

    return start


def wait_until(condition, seconds=100):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def lines_of(run):
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def one_line(err: str) -> str:
    """The only line that says how it ended."""
    ends = [line for line in err.splitlines() if line.startswith("nvae-fast: ")]
    assert len(ends) == 1 and "Traceback" not in err, err
    return ends[0]


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    """Loss, gradients and BN statistics of single steps, in every memory mode; with compat="nvlabs" gradients differ, because
    each process balances the KL of its own images."""
    errors = tmp_path / "errors.json"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "two_processes.py", errors], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(errors.read_text())
    assert len(found) == 30
    for name, error in found.items():
        local = name.startswith("nvlabs") and not name.endswith("statistics")
        assert error > 1e-4 if local else error < 3e-6, (name, error)


def test_a_whole_run_and_one_that_was_stopped(ranks, processes, tmp_path, metrics, same_run):
    ranks(tmp_path / "whole")
    codes, err = processes.wait_for_all()
    assert codes == [0, 0] and "2 processes on cpu" in err and err.count("done: ") == 1, err
    lines = metrics(tmp_path / "whole")
    assert [line["event"] for line in lines] == 3 * [*3 * ["train"], "valid"]
    pids = ranks(tmp_path / "run", "--resume")
    wait_until(lambda: lines_of(tmp_path / "run") >= 2)
    os.kill(pids[1], signal.SIGTERM)  # one of them is enough
    codes, err = processes.wait_for_all()
    assert codes in ([143, 143], [0, 0]) and (codes[0] == 0 or "SIGTERM; state saved" in one_line(err))
    ranks(tmp_path / "run", "--resume")
    assert processes.wait_for_all()[0] == [0, 0]
    same_run(tmp_path / "run", tmp_path / "whole")


def test_another_number_of_processes(ranks, processes, train, stop_at, tmp_path, metrics, finished):
    stop_at(4)
    assert train(tmp_path / "run").code == 143
    stop_at(None)
    ranks(tmp_path / "run", "--resume")
    codes, err = processes.wait_for_all()
    assert codes == [0, 0], err
    ours, plain = metrics(tmp_path / "run"), metrics(finished)
    assert ours[:5] == plain[:5] and [line["step"] for line in ours] == [line["step"] for line in plain]
    assert abs(ours[-1]["nelbo"] / plain[-1]["nelbo"] - 1) < 0.05  # the same batches, other noise
    result = train(tmp_path / "run", "--resume", *PARTS)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "trained by 2 process(es) with batches of 8, which 1 with batches of 8 cannot continue" in result.err
    assert "resume with 2 processes, or with --batch_size 16" in result.err
    assert train(tmp_path / "run", "--resume").code == 0  # one with batches of 16


@pytest.mark.parametrize(("total", "valid"), [(49, 5), (12, 1)])
def test_a_validation_that_cannot_be_shared_out_evenly(ranks, processes, cli, tmp_path, total, valid, waves, metrics):
    """The second process has a batch less than the first, or none at all; so in `evaluate`, whose numbers are those of one."""
    np.save(tmp_path / "few.npy", waves(total))
    run = tmp_path / "run"
    ranks(run, "--data", tmp_path / "few.npy", "--batch_size", 2, "--epochs", 2, "--warmup_epochs", 0)
    codes, err = processes.wait_for_all()
    assert codes == [0, 0], err
    assert [line["event"] for line in metrics(run)][-1] == "valid"
    evaluate = ("evaluate", run, "--metrics", "nll,fd", "--num_iw_samples", 2, "--num_samples", 20, "--features", "pixels")
    one = read_scores(cli, run, *evaluate)
    processes.start_several([[*evaluate, "--save", tmp_path / "both"]] * 2)
    codes, out = processes.wait_for_all()
    assert codes == [0, 0] and out.count(f"{valid} images (valid)") == 1 and out.count("20 samples") == 1, out
    both = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert both["images"] == one["images"] == valid and both["weights"] == one["weights"]
    assert both["nelbo"] == pytest.approx(one["nelbo"], rel=0.05)  # each process draws noise of its own
    (label,) = one["distances"]
    assert both["distances"][label]["value"] == pytest.approx(one["distances"][label]["value"], rel=1e-5)


def read_scores(cli, run: Path, *argv: object) -> dict:
    assert cli(*argv).code == 0
    return json.loads((run / "evaluation.json").read_text())


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process(ranks, processes, tmp_path, latest, lost):
    run = tmp_path / "run"
    pids = ranks(run, "--epochs", 500)
    wait_until(lambda: lines_of(run) >= 5)
    os.kill(pids[lost], signal.SIGKILL)
    began, step = time.monotonic(), latest(run).name
    codes, err = processes.wait_for_all()
    assert time.monotonic() - began < 30
    assert codes[lost] == -signal.SIGKILL and codes[1 - lost] == 1
    line = one_line(err)
    assert "gone: the others end, nothing was saved; the last checkpoint stands, continue with --resume auto" in line
    assert lost == 0 or "process 1 of 2 is gone" in line
    assert latest(run).name in (step, f"step-{int(step[5:]) + 3:08d}")  # one that was under way


def test_a_process_that_hangs_up_while_the_other_computes(ranks, processes, tmp_path):
    """Stopped, not dead: no sign of life, no closed connection."""
    run = tmp_path / "run"
    pids = ranks(run, "--epochs", 500)
    wait_until(lambda: lines_of(run) >= 5)
    os.kill(pids[1], signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: not Path(f"/proc/{pids[0]}/stat").exists() or _is_zombie(pids[0]), 30)
    assert time.monotonic() - began < 30
    os.kill(pids[1], signal.SIGKILL)
    codes, err = processes.wait_for_all()
    assert codes == [1, -signal.SIGKILL] and "process 1 of 2 is gone" in one_line(err)


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--learning_rate", 0.02), "process 1 of 2 has learning_rate=0.02, process 0 has 0.007"),
        (("--seed", 7), "process 1 of 2 has seed=7, process 0 has 1"),
        ((), "process 1 of 2 has training images=45, process 0 has 54"),
    ],
)
def test_processes_that_disagree(ranks, processes, tmp_path, images, flags, said):
    if not flags:
        np.save(tmp_path / "fewer.npy", np.load(images)[:50])
        flags = ("--data", tmp_path / "fewer.npy")
    ranks(tmp_path / "run", other=flags)
    codes, err = processes.wait_for_all()
    assert codes == [2, 2] and said in one_line(err) and "start all of them with the same flags and the same files" in err
    assert not (tmp_path / "run").exists()


def test_one_process_that_fails(ranks, processes, tmp_path):
    """Its line is the only one, and all end with its exit code."""
    ranks(tmp_path / "run", other=("--data", tmp_path / "none"))
    codes, err = processes.wait_for_all()
    assert codes == [2, 2] and "none does not exist" in one_line(err)


def test_the_command_starts_the_processes(command, tmp_path, metrics):
    """A process of its own, as a shell starts it; Ctrl-C reaches the processes once."""
    argv = [
        sys.executable,
        "-m",
        "nvae_fast.cli",
        *command(tmp_path / "run", *PARTS, "--num_process_per_node", 2, "--epochs", 500),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([str(a) for a in argv], env=env, stderr=subprocess.PIPE, text=True) as started:
        try:
            wait_until(lambda: lines_of(tmp_path / "run") >= 2)
            started.send_signal(signal.SIGINT)
            err = started.communicate(timeout=60)[1]
        finally:
            started.kill()
    assert started.returncode == 130
    assert one_line(err) == "nvae-fast: stopped by SIGINT; state saved, continue with --resume auto"
    steps = [line["step"] for line in metrics(tmp_path / "run") if line["event"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
