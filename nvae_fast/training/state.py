"""What a run is made of beside its weights, as tensors and JSON, and the folder of its checkpoints."""

from __future__ import annotations

import dataclasses
import shutil
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
from nvae_fast.regularization import SpectralState

MOMENTS = ("step", "exp_avg", "exp_inf", "ema")  # the last where the optimiser averages the weights


@dataclass
class Progress:
    """Where a run stands: steps done, the epoch it is in, batches done in it, their summed loss, the best validation."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    best: float | None = None


def training_state(model: NVAE, optimizer: torch.optim.Optimizer, spectral: SpectralState, progress: Progress):
    """(tensors, JSON values) of everything but the weights: moments, singular vectors, random state, position."""
    tensors: dict[str, Tensor] = {f"spectral/{k}": v for k, v in spectral.state_dict().items()}
    for name, p in model.named_parameters():
        for moment, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer/{moment}/{name}"] = torch.as_tensor(value)
    tensors["random/cpu"] = torch.get_rng_state()
    if model.prior_ftr0.is_cuda:
        tensors["random/cuda"] = torch.cuda.get_rng_state(model.prior_ftr0.device)
    return tensors, {"progress": dataclasses.asdict(progress), "torch": torch.__version__}


def restore(folder: Path, model: NVAE, optimizer: torch.optim.Optimizer, spectral: SpectralState) -> Progress:
    """Put model, optimiser, singular vectors and random state where the checkpoint in `folder` left them."""
    load_weights(model, folder)
    tensors, meta = load_training(folder)
    _fill_optimizer(optimizer, model, tensors)
    device = model.prior_ftr0.device
    spectral.load_state_dict(
        {k.removeprefix("spectral/"): t.to(device) for k, t in tensors.items() if k.startswith("spectral/")}
    )
    try:
        torch.set_rng_state(tensors["random/cpu"])
    except (KeyError, RuntimeError) as error:
        raise InputError(f"the random state in '{folder}' is damaged ({error}): resume from another checkpoint") from None
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    return _progress(folder, meta)


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
        if not all(isinstance(n, int) and n >= 0 for n in (progress.step, progress.epoch, progress.batch)):
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
            state[i] = {m: p for m in MOMENTS if m != "ema" or f"optimizer/ema/{name}" in tensors} | {"step": torch.zeros(())}
            expected |= {f"optimizer/{m}/{name}": like for m, like in state[i].items()}
    check_keys(expected, {k: t for k, t in tensors.items() if k.startswith("optimizer/")})
    for i, (name, _) in enumerate(named_parameters):
        if i in state:
            state[i] = {m: tensors[f"optimizer/{m}/{name}"] for m in state[i]}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class Checkpoints:
    """The folder `checkpoints` of a run: one folder per save; the text files `latest` and `best` name one each.

    Only those two are kept. A kill at any moment leaves `latest` naming a whole checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def latest(self) -> Path | None:
        """The newest checkpoint, if there is one."""
        return named(self.folder, "latest")

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
        """Remove the checkpoints that no name points to, and what a kill left unfinished."""
        keep = {named(self.folder, "best"), named(self.folder, "latest")}
        for old in [*self.folder.glob("step-*"), *self.folder.glob(".*.tmp")]:
            if old.is_file():
                old.unlink(missing_ok=True)
            elif old not in keep:
                shutil.rmtree(old, ignore_errors=True)
