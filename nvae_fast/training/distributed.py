"""Several processes as one run: who takes part, what they agree on, and what becomes of the others when one is lost."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nvae_fast.errors import InputError, RunError
from nvae_fast.training.signals import Interrupted

TIMEOUT = timedelta(minutes=10)  # of a collective: no process is that much later than another unless something hangs
BEAT, MISSED = 1.0, 8  # seconds between signs of life; how many may fail to come
CONNECT, VERDICT = timedelta(seconds=5), 20.0  # for a word with the store; until it is known which process was lost, in seconds
ENDINGS = (InputError, RunError, Interrupted, KeyboardInterrupt)  # those that the command line turns into one line
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """The processes of a run as one of them sees them. With one process every method returns at once."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files, logs and the progress bar."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def largest(self, value: int) -> int:
        """The largest of the values that all processes pass."""
        if self.size == 1:
            return value
        tensor = torch.tensor(int(value))
        dist.all_reduce(tensor, dist.ReduceOp.MAX)  # on the CPU: no GPU has to wait for it
        return int(tensor)

    def gather(self, value: Any) -> list[Any]:
        """The values that all processes pass, by rank."""
        values = [value]
        if self.size > 1:
            values *= self.size
            dist.all_gather_object(values, value)
        return values

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes of a tensor of one shape, without gradient."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def same(self, settings: dict[str, Any]) -> None:
        """InputError, on all processes, that names the first setting in which one differs from the process of rank 0."""
        for rank, theirs in enumerate(self.gather(settings)):
            if rank == 0:
                first = theirs
            for name in first:
                if theirs.get(name) != first[name]:
                    raise InputError(
                        f"process {rank} of {self.size} has {name}={theirs.get(name)}, process 0 has {first[name]}: "
                        "start all of them with the same flags and the same files"
                    )


def environment() -> dict[str, str] | None:
    """What torchrun, or the command itself, told this process about its place among several; None for a process alone."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
        return None
    missing = [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} without {missing[0]} in the environment: start the processes with torchrun "
            "or --num_process_per_node, or unset WORLD_SIZE"
        )
    return {name: os.environ[name] for name in ENVIRONMENT}


def device_of_process(device: torch.device, local_rank: int) -> torch.device:
    """The GPU of the process with that rank on its machine; the CPU as it is."""
    if device.type == "cuda":
        if device.index is not None:
            raise InputError(f"--device {device} for several processes: use --device cuda, each then takes the GPU of its own")
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs: start one process per GPU, "
                "or use --device cpu"
            )
        return torch.device("cuda", local_rank)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """This process among those that it was started with; alone when it was started alone.

    NCCL joins GPUs, gloo CPUs. When a process fails or is lost the others end within 30 s wherever they are, without saving;
    one of all says why in one line. They end with the exit code of the one that failed, 1 when one was lost.
    """
    env = environment()
    if env is None:
        yield Processes(device=device)
        return
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    device = device_of_process(device, int(env["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        raise RunError(f"process {rank} of {size} did not meet the others at {place} ({_line(error)})") from None
    watch = Watch(env["MASTER_ADDR"], int(env["MASTER_PORT"]), rank, size)
    try:
        dist.barrier()  # every process has given its first sign of life
        watch.start()
        yield Processes(rank, size, device)
        dist.barrier()
        watch.stop()
        dist.barrier()  # nobody leaves while another still looks for it
        dist.destroy_process_group()
    except BaseException as error:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # torchrun sends it when another process has failed: the reason comes first
        known, code = isinstance(error, ENDINGS), exit_code(error)
        if watch.tell(error, code) and known:
            raise
        if not known:
            traceback.print_exception(error)
        leave(code)


class Watch(threading.Thread):
    """Gives signs of life, looks for those of the others, and ends this process when one of them is lost.

    A thread of its own: the main one may wait in a collective for a process that is gone. Signs that did not come are counted,
    not timed, so that a machine which was suspended does not count as lost.
    """

    def __init__(self, host: str, port: int, rank: int, size: int) -> None:
        super().__init__(name="nvae-fast-watch", daemon=True)
        self.rank, self.size = rank, size
        self._prefix = f"nvae_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._place = host, port
        self._store = self._connect()
        self._keys = [self._key(str(r)) for r in range(size)]
        self._store.set(self._keys[rank], "0")
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._parent = os.getppid()

    def _connect(self) -> dist.TCPStore:
        return dist.TCPStore(*self._place, is_master=False, wait_for_workers=False, timeout=CONNECT)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def run(self) -> None:
        seen, silent = [b""] * self.size, [0] * self.size
        beats = refused = 0
        while not self._ended.wait(BEAT):
            if os.getppid() != self._parent:
                self._end("the process that started this one is gone")
            beats += 1
            try:
                self._store = self._store if refused == 0 else self._connect()
                self._store.set(self._keys[self.rank], str(beats))
                now = self._store.multi_get(self._keys)
                if self._store.check([self._key("failed")]):
                    self._end(None, int(self._store.get(self._key("failed"))))
            except RuntimeError:  # its host is gone, or this machine was suspended
                refused += 1
                if refused == 2:  # nor does it take a new connection
                    self._end("process 0, or the machine it ran on, is gone")
                continue
            refused = 0
            silent = [0 if a != b else n + 1 for a, b, n in zip(seen, now, silent, strict=True)]
            seen = now
            for rank, missed in enumerate(silent):
                if missed >= MISSED and rank != self.rank:
                    self._end(f"process {rank} of {self.size} is gone")

    def _end(self, why: str | None, code: int = 1) -> None:
        with self._lock:
            if self._ended.is_set():
                return
            if why is not None and self._first():
                self._print(
                    f"{why}: the others end, nothing was saved; the last checkpoint stands, continue with --resume auto"
                )
            leave(code)

    @staticmethod
    def _print(line: str) -> None:
        print(f"nvae-fast: {line}", file=sys.stderr, flush=True)

    def stop(self) -> None:
        with self._lock:
            self._ended.set()

    def _first(self) -> bool:
        """Whether no process has said anything yet about the end of the run."""
        try:
            return self._store.add(self._key("told"), 1) == 1
        except RuntimeError:
            return self.rank <= 1  # process 0 held the count

    def tell(self, error: BaseException, code: int) -> bool:
        """Let the others end, for this process ends by `error`; whether it is the one to say so.

        A failed collective is no error of this process: it waits until it is known which one was lost.
        """
        if isinstance(error, RuntimeError) and not isinstance(error, RunError) and self.is_alive():
            self.join(VERDICT)  # ends the process if another one is lost
        self.stop()
        try:
            first = self._first()
            self._store.set(self._key("failed"), str(code))
        except RuntimeError:
            return True
        time.sleep(0 if self.rank else 2 * BEAT)  # this process may be the host of the store that the others look at
        return first


def exit_code(error: BaseException) -> int:
    """With what a command ends that `error` ends."""
    codes = {InputError: 2, Interrupted: getattr(error, "exit_code", 1), KeyboardInterrupt: 130}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def leave(code: int) -> None:
    """End this process at once: threads of gloo and NCCL may wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
