"""Real processes without the seconds that importing torch takes."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

_SERVER = """
import importlib, json, os, resource, signal, socket, sys
import torch._dynamo
import nvae_fast.cli, nvae_fast.training, nvae_fast.evaluation
try:
    import torch.utils.tensorboard
except ImportError:
    pass

def die_at(count):  # SIGKILL before the count-th step of putting a file in its place
    calls = iter(range(1, 10**9))
    def dying(function):
        def call(*args, **kwargs):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "rmdir", "unlink"):
        setattr(os, name, dying(getattr(os, name)))

def fork(job, argv, writing, env):
    pid = os.fork()
    if pid:
        return pid
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(writing, stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job["die_at"]:
        die_at(job["die_at"])
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
    code = nvae_fast.cli.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch down takes seconds

def env_of(rank, size, port):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}

for line in sys.stdin:
    job = json.loads(line)
    reading, writing = os.pipe()  # stdout and stderr: not a file, for which file_limit would hold, too
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = len(job["argv"])
    pids = [fork(job, argv, writing, env_of(rank, size, port) if size > 1 else {}) for rank, argv in enumerate(job["argv"])]
    os.close(writing)
    print(*pids, flush=True)
    with open(reading, "rb") as stream, open(job["err"], "wb") as err:
        err.write(stream.read())
    print(*[os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids], flush=True)
"""


class Processes:
    """Real processes without the seconds that importing torch takes: forks of one that has imported it and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.err = folder / "stderr"
        self._answers = b""
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, *argv: object, **options: int) -> int:
        """The id of a new process that runs the command."""
        return self.start_several([argv], **options)[0]

    def start_several(self, commands: Sequence[Sequence[object]], *, die_at: int = 0, file_limit: int = 0) -> list[int]:
        """The ids of new processes that run a command each, as the ranks of one run if they are several."""
        argv = [[str(a) for a in command] for command in commands]
        job = {"argv": argv, "err": str(self.err), "die_at": die_at, "file_limit": file_limit}
        self._server.stdin.write(json.dumps(job).encode() + b"\n")
        self._server.stdin.flush()
        return [int(pid) for pid in self._answer().split()]

    def wait(self) -> tuple[int, str]:
        """Exit code (negative: a signal) and output (stdout and stderr) of the process that was started last."""
        (code,), err = self.wait_for_all()
        return code, err

    def wait_for_all(self) -> tuple[list[int], str]:
        """Exit codes and common output of the processes that were started last."""
        return [int(code) for code in self._answer().split()], self.err.read_text()

    def run(self, *argv: object, **options: int) -> tuple[int, str]:
        self.start(*argv, **options)
        return self.wait()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def _answer(self) -> str:
        while b"\n" not in self._answers:
            ready, _, _ = select.select([self._server.stdout], [], [], 120)
            assert ready, "no answer in two minutes"
            self._answers += os.read(self._server.stdout.fileno(), 4096) or pytest.fail("the server of processes died")
        line, _, self._answers = self._answers.partition(b"\n")
        return line.decode()
