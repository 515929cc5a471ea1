"""What a run is made of beside its weights, as tensors and JSON, and the folder of its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_write, check_keys
from nvae_fast.checkpoint.native import MODEL, TRAINING, load_training, load_weights, named, save_training
from nvae_fast.errors import InputError
from nvae_fast.model import NVAE
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import shape_key
from nvae_fast.training.distributed import Processes
from nvae_fast.training.step import TrainingStep

STEP = re.compile(r"step-\d+(-\d+)?")
MOMENTS = ("step", "exp_avg", "exp_inf", "ema")  # the last where the optimiser averages the weights


@dataclass
class Progress:
    """Where a run stands: steps done, the epoch it is in, batches done in it, the best validation, how often it was rolled
    back."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    rollbacks: int = 0


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of the generators that a process on `device` draws from, by name."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Put the generators where `random_state` found them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def training_state(step: TrainingStep, progress: Progress, loss: Tensor, processes: Processes):
    """(tensors, JSON values) of everything but the weights: moments, averaged weights, singular vectors, counts of skipped
    steps, loss scale, position; and by process the random state and `loss`, the sum and the number of this epoch's losses.
    All processes call it, what it returns to the first one counts."""
    own = processes.gather({f"random/{k}": t for k, t in random_state(loss.device).items()} | {"loss": loss.cpu()})
    tensors = {k: torch.stack([states[k] for states in own]) for k in own[0]}
    tensors |= {f"spectral/{k}": v for k, v in step.spectral.state_dict().items()}
    tensors |= {f"step/{k}": v for k, v in step.state_dict().items()}
    for name, p in step.model.named_parameters():
        for moment, value in step.optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{moment}/{name}"] = torch.as_tensor(value)
    return tensors, {"progress": dataclasses.asdict(progress), "processes": processes.size, "torch": torch.__version__}


def restore(folder: Path, step: TrainingStep, loss: Tensor, processes: Processes) -> Progress:
    """Put all that `step` trains and moves along, `loss` and the random state where the checkpoint in `folder` left them.

    With another number of processes than it was saved by, each goes on from a random state of its own, drawn from that of the
    first one, and from the mean loss.
    """
    load_weights(step.model, folder)
    tensors, meta = _of_this_version(*load_training(folder))
    _fill_optimizer(step.optimizer, step.model, tensors)
    vectors = _below("spectral/", tensors)
    check_keys(_vectors(step.model) if vectors else {}, vectors)
    step.spectral.load_state_dict({k: t.to(loss.device) for k, t in vectors.items()})
    try:
        step.load_state_dict(_below("step/", tensors))
        saved = _below("random/", tensors)
        same = len(saved["cpu"]) == processes.size
        set_random_state({k: t[processes.rank if same else 0].clone() for k, t in saved.items()}, loss.device)
        loss.copy_(tensors["loss"][processes.rank] if same else tensors["loss"].mean(0))
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise InputError(f"the random state in '{folder}' is damaged ({error}): resume from another checkpoint") from None
    if not same:
        seed_process(int(torch.randint(2**62, ())), processes.rank)
    return _progress(folder, meta)


def _of_this_version(tensors: dict[str, Tensor], meta: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `training_state` would have returned: before there were several processes, a run had one random state and one
    sum of losses, in its position."""
    progress = meta.get("progress")
    if not isinstance(progress, dict) or "loss_sum" not in progress:
        return tensors, meta
    position = {k: v for k, v in progress.items() if k != "loss_sum"}
    tensors = {k: t.unsqueeze(0) if k.startswith("random/") else t for k, t in tensors.items()}
    try:
        tensors["loss"] = torch.tensor([[progress["loss_sum"], position["batch"]]], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, RuntimeError):
        pass  # refused as damaged
    return tensors, meta | {"progress": position}


def _vectors(model: NVAE) -> dict[str, Tensor]:
    """Tensors without values, in the shapes of the singular vectors of all convolutions."""
    counts = Counter(shape_key(conv.weight) for conv in model.convolutions())
    sides = {key: map(int, key.split("x")) for key in counts}
    return {f"{name}/{key}": torch.empty(counts[key], side, device="meta")
            for key, both in sides.items() for name, side in zip("uv", both, strict=True)}  # fmt: skip


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def seed_process(seed: int, rank: int) -> None:
    """Random numbers that differ from process to process and do so again in another run."""
    torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)


def load_optimizer(folder: Path, model: NVAE) -> tuple[torch.optim.Optimizer, Progress]:
    """The optimiser of a checkpoint over the parameters of `model`, and its position; fresh ones where there are none."""
    optimizer = make_optimizer(model)
    if not (folder / TRAINING).is_file():
        return optimizer, Progress()
    tensors, meta = load_training(folder)
    _fill_optimizer(optimizer, model, tensors)
    return optimizer, _progress(folder, meta)


def _progress(folder: Path, meta: dict[str, Any]) -> Progress:
    try:
        progress = Progress(**meta["progress"])
        counts = (value for name, value in vars(progress).items() if name != "best")
        good = all(type(n) is int and n >= 0 for n in counts)
        if not good or not (progress.best is None or type(progress.best) in (int, float)):
            raise TypeError(f"{progress}")
        return progress
    except (KeyError, TypeError) as error:
        raise InputError(f"the position in '{folder}' is damaged ({error}): resume from another checkpoint") from None


def _fill_optimizer(optimizer: torch.optim.Optimizer, model: NVAE, tensors: dict[str, Tensor]) -> None:
    expected: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    named_parameters = list(model.named_parameters())
    for i, (name, p) in enumerate(named_parameters):
        if f"optimizer/step/{name}" in tensors:
            state[i] = {m: p for m in MOMENTS if m != "ema" or f"optimizer/{m}/{name}" in tensors} | {"step": torch.zeros(())}
            expected |= {f"optimizer/{m}/{name}": like for m, like in state[i].items()}
    check_keys(expected, {k: t for k, t in tensors.items() if k.startswith("optimizer/")})
    for i, (name, _) in enumerate(named_parameters):
        if i in state:
            state[i] = {m: tensors[f"optimizer/{m}/{name}"] for m in state[i]}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoints:
    """The folder `checkpoints` of a run: one folder per save; the text files `latest` and `best` name one each.

    Those two are kept, and of the others the newest, `keep` in all with `latest`. A kill at any moment leaves `latest` naming
    a whole checkpoint.
    """

    def __init__(self, folder: Path, keep: int = 1) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest checkpoint, if there is one; InputError where it cannot be told which of several it is."""
        latest = named(self.folder, "latest")
        if latest is None and (lost := [c.name for c in self._all() if _order(c)[0] > 0]):
            raise InputError(
                f"'{self.folder}' holds {max(lost)}, but no readable file 'latest': write the name of the checkpoint to go on "
                "with there, or choose another --out"
            )
        return latest

    def _all(self) -> list[Path]:
        """The checkpoints that a run has written; what users put beside them under other names is theirs."""
        return [folder for folder in self.folder.glob("step-*") if STEP.fullmatch(folder.name)]

    def resolve(self, path: str) -> Path:
        """The checkpoint folder at `path` (a checkpoint, or a run folder, whose newest counts)."""
        for candidate in (Path(path), named(Path(path) / "checkpoints", "latest")):
            if candidate is not None and (candidate / MODEL).is_file() and (candidate / TRAINING).is_file():
                return candidate
        raise InputError(f"nothing to resume at '{path}': give a run folder, one of its checkpoints, or --resume auto")

    def save(self, model: NVAE, tensors: dict[str, Tensor], meta: dict[str, Any], *, step: int, best: bool) -> None:
        """Write the checkpoint of a step, name it, then `tidy`."""
        name = f"step-{step:08d}"
        target, again = self.folder / name, 0
        # The same step may have been saved before: by an interruption right after an epoch, or by a run that was killed.
        while target.exists():
            again += 1
            target = self.folder / f"{name}-{again}"
        save_training(target, model, tensors, meta)
        for label in ("best", "latest") if best else ("latest",):
            atomic_write(self.folder / label, lambda file: file.write(f"{target.name}\n".encode()))
        self.tidy()

    def tidy(self) -> None:
        """Remove the checkpoints that are not kept, and what a kill left unfinished.

        One newer than `latest` was written by a save that a kill cut short, and is no part of what the run goes on with.
        """
        latest = named(self.folder, "latest")
        keep = {named(self.folder, "best"), latest}
        if latest is not None:
            before = [old for old in self._all() if _order(old) < _order(latest)]
            keep |= set(sorted(before, key=_order)[len(before) - min(self.keep - 1, len(before)) :])
        for old in set(self._all()) - keep:
            hidden = old.with_name(f".{old.name}.tmp")  # first: a kill must not leave a checkpoint that lacks some files
            shutil.rmtree(hidden, ignore_errors=True)
            with contextlib.suppress(OSError):
                os.replace(old, hidden)
        for left in self.folder.glob(".*.tmp"):
            if left.is_file():
                left.unlink(missing_ok=True)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _order(folder: Path) -> tuple[int, ...]:
    """(step, repetition) of a checkpoint folder, by which they follow one another."""
    return tuple(map(int, re.findall(r"\d+", folder.name)))
