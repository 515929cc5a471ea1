"""Starts the processes of a run on this machine, as torchrun would: `--num_process_per_node` and its kin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from nvae_fast.errors import RunError

PORT = 6020  # of a run on several machines, as in the public code; one machine takes any free port
PATIENCE = 30.0  # seconds between the end of one process and the end of all


def launch(argv: Sequence[str], *, processes: int, nodes: int = 1, node: int = 0, address: str = "127.0.0.1") -> int:
    """Run `nvae-fast *argv` in `processes` processes on this machine, the `node`-th of `nodes`; the exit code of the run.

    Ctrl-C and SIGTERM reach every process once. The code is 0 if all ended with 0, else that of the processes, 1 where one was
    killed. `address` is that of machine 0, which needs port 6020 free if there are several.
    """
    store = None
    if node == 0:
        port = PORT if nodes > 1 else 0
        try:  # held here: it outlives any process of the run, and a free port stays ours
            store = dist.TCPStore(address, port, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=10))
        except RuntimeError as error:
            line = str(error).splitlines()[0]
            raise RunError(f"cannot listen at {address}:{port} ({line}): end what holds the port, or use torchrun") from None
    port = store.port if store is not None else PORT
    common = {
        "MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(processes * nodes),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // processes, 1))),
    }  # fmt: skip
    if nodes == 1 and sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        common["GLOO_SOCKET_IFNAME"] = "lo"  # gloo would look this machine's name up, which may lead nowhere
    children: list[subprocess.Popen] = []

    def forward(signum: int, frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    previous = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        for local in range(processes):
            own = {"RANK": str(node * processes + local), "LOCAL_RANK": str(local)}
            children.append(subprocess.Popen(
                [sys.executable, "-m", "nvae_fast.cli", *argv], env=os.environ | common | own,
                start_new_session=True,  # else Ctrl-C would reach them twice
            ))  # fmt: skip
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)
        del store


def _wait(children: list[subprocess.Popen]) -> int:
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() for child in children):
            deadline = time.monotonic() + PATIENCE
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)
    codes = {child.returncode for child in children}
    return 0 if codes == {0} else next((code for code in (2, 143, 130) if code in codes), 1)
