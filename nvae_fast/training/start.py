"""Where a run starts: afresh, or from a checkpoint that fits it."""

from __future__ import annotations

from pathlib import Path

from nvae_fast.checkpoint.native import META, read_config, read_json
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.training.distributed import Processes
from nvae_fast.training.state import Checkpoints

FREE = ("training", "name", "data", "accumulate")  # what may differ: names, places, and how a batch is cut to fit into memory


def starting_point(
    config: NVAEConfig, checkpoints: Checkpoints, out: Path, resume: str | None, processes: Processes
) -> Path | None:
    """The checkpoint folder to resume from, if any; refuses to mix two runs in one folder, and other settings.

    Another number of processes is welcome as long as all of them together see the same batches.
    """
    start = checkpoints.latest() if resume in (None, "auto") else checkpoints.resolve(resume)
    if start is None:
        return None
    if resume is None:
        raise InputError(f"'{out}' already holds a run: continue it with --resume auto, or choose another --out")
    if checkpoints.latest() is not None and start.resolve().parent != checkpoints.folder.resolve():
        raise InputError(f"'{out}' already holds another run than that of '{start}': choose another --out")
    saved, now = read_config(start).to_dict(), config.to_dict()
    before = saved_processes(start)
    if before != processes.size:
        old, new = saved["training"].pop("batch_size"), now["training"].pop("batch_size")
        if old * before != new * processes.size:
            cure = f"resume with {before} processes"
            if old * before % processes.size == 0:
                cure += f", or with --batch_size {old * before // processes.size}"
            raise InputError(
                f"'{start}' was trained by {before} process(es) with batches of {old}, which {processes.size} with batches of "
                f"{new} cannot continue: {cure}"
            )
    for part, old, new in (("", saved, now), ("training ", saved["training"], now["training"])):
        for name in old:
            if name not in FREE and old[name] != new[name]:
                raise InputError(
                    f"'{start}' was trained with {part}{name}={old[name]}, not {new[name]}: resume with its settings, "
                    "or choose another --out"
                )
    return start


def saved_batch(checkpoints: Checkpoints, resume: str | None, processes: int) -> int | None:
    """The batch of each of `processes` with which the run to resume goes on; None where there is nothing to resume."""
    start = None if resume is None else checkpoints.latest() if resume == "auto" else checkpoints.resolve(resume)
    return None if start is None else read_config(start).training.batch_size * saved_processes(start) // processes


def saved_processes(folder: Path) -> int:
    """How many processes saved the checkpoint in `folder`."""
    count = read_json(folder / META).get("processes", 1)
    if not isinstance(count, int) or count < 1:
        raise InputError(f"the number of processes in '{folder / META}' is damaged: resume from another checkpoint")
    return count
