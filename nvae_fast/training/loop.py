"""The training loop: steps, checkpoints, resume, and the way back from a divergence."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_write, writing
from nvae_fast.checkpoint.native import CONFIG, json_bytes
from nvae_fast.config import NVAEConfig, TrainConfig
from nvae_fast.data import ImageSource
from nvae_fast.errors import InputError, RunError
from nvae_fast.evaluation import Likelihood
from nvae_fast.layers import convert_sync_batch_norm
from nvae_fast.model import NVAE
from nvae_fast.objective import kl_coefficient, learning_rate, norm_coefficient
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.training.data import loader
from nvae_fast.training.distributed import Processes
from nvae_fast.training.doctor import Finding, diagnose
from nvae_fast.training.log import NoLog, RunLog, peak_memory
from nvae_fast.training.parallel import parallel_loss
from nvae_fast.training.signals import Interrupted, StopSignals
from nvae_fast.training.start import starting_point
from nvae_fast.training.state import Checkpoints, Progress, random_state, restore, seed_process, training_state
from nvae_fast.training.step import TrainingStep
from nvae_fast.training.validation import readable, validate

ROLLBACKS = 3  # how often a run goes back before it gives up
RATE_FACTOR, NORM_FACTOR, LEAST_NORM = 0.5, 2.0, 5e-3  # what each does to the learning rate and to lambda, at least this before


@dataclass
class Options:
    """How to run, as opposed to what: nothing here changes the numbers of a CPU run in float32 that does not diverge."""

    out: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"  # or bf16, fp16: autocast of the forward pass and the loss
    graph: bool = False  # replay the step as one CUDA graph
    memory: str = "balanced"  # what cells keep for backward: fast, balanced or low
    resume: str | None = None  # None: a new run; "auto": go on if there is something to go on with; or a checkpoint folder
    workers: int = 0
    log_every: int = 10  # steps between two lines of metrics.jsonl
    valid_samples: int = 1  # importance samples in the validation
    images: bool = True
    bar: bool = True
    save_every: int = 0  # steps between two checkpoints within an epoch; 0: only at its end
    keep: int = 1  # newest checkpoints that stay, beside the best one
    max_skipped: int = 10  # steps skipped in a row before the run goes back to its last checkpoint


class Diverged(Exception):
    """The run cannot go on from where it stands."""


class Trainer:
    """Trains the model of `config` on `train` (an ImageSource), validating on `valid`, into the folder `options.out`."""

    def __init__(self, config: NVAEConfig, train: ImageSource, valid: ImageSource, options: Options,
                 processes: Processes | None = None) -> None:  # fmt: skip
        self.config, self.options = config, options
        self.processes = processes = processes or Processes(device=options.device)
        c = config.training
        self.checkpoints = Checkpoints(options.out / "checkpoints", options.keep)
        start = starting_point(config, self.checkpoints, options.out, options.resume, processes)
        processes.same(settings(config, options, train, valid, start))
        torch.manual_seed(c.seed)
        np.random.seed(c.seed % 2**32)
        self.model = NVAE(config).to(options.device, memory_format=torch.channels_last)
        self.model.set_memory(options.memory)
        if processes.size > 1:
            convert_sync_batch_norm(self.model)
        if not processes.main:
            seed_process(c.seed, processes.rank)  # the weights are the same, their noise is not
        self.step = TrainingStep(
            self.model, make_optimizer(self.model, ema_decay=c.ema_decay or None), SpectralState(c.seed),
            loss=parallel_loss(self.model, processes), precision=options.precision, accumulate=c.accumulate,
            max_grad_norm=c.max_grad_norm or None, graph=options.graph,
        )  # fmt: skip
        share = {"workers": options.workers, "device": options.device, "rank": processes.rank, "world": processes.size}
        self.train_loader = loader(config, train, train=True, **share)
        self.valid_loader = loader(config, valid, train=False, **share)
        self.progress = Progress()
        self.loss = torch.zeros(2, dtype=torch.float64, device=options.device)  # sum and number of the losses of this epoch
        self._from_data = [m for m in self.model.convolutions() if getattr(m, "data_init_pending", False)]
        if start is not None:
            self._restore(start)
            p, steps = self.progress, len(self.train_loader)
            if p.step != p.epoch * steps + p.batch or p.batch > steps:
                raise InputError(
                    f"'{start}' does not fit '{train.name}': {len(train)} images make {steps} steps an epoch, and its step "
                    f"{p.step} is not batch {p.batch} of epoch {p.epoch}; resume with the data it was trained on"
                )
        self.skipped = int(self.step.skipped)  # steps left out for non-finite values, as known so far
        self._diagnosed = False
        self._fresh = self.checkpoints.latest() is None
        if processes.main:
            with writing(options.out):
                options.out.mkdir(parents=True, exist_ok=True)
            atomic_write(options.out / CONFIG, lambda file: file.write(json_bytes(config.to_dict())))

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * len(self.train_loader)

    def run(self) -> Likelihood | None:
        """Train to the last epoch; the last validation. Raises Interrupted after saving, when asked to stop."""
        self.processes.barrier()  # all have read what the first one tidies up
        if self.processes.main:
            self.checkpoints.tidy()
        self.log = self._open_log()
        result = None
        try:
            with StopSignals() as self.stop:
                if self._fresh:
                    self._save()  # a place that cannot be written to shows now, and there is a way back from the first epoch
                while self.progress.epoch < self.config.training.epochs:
                    try:
                        result = self._epoch_or_stop() or result
                    except Diverged as reason:
                        self._roll_back(str(reason))
        finally:
            self.log.close()
        return result

    def _open_log(self) -> RunLog | NoLog:
        o, p = self.options, self.progress
        if not self.processes.main:
            return NoLog()
        batch = self.config.training.batch_size * self.processes.size
        return RunLog(o.out, total_images=self.total_steps * batch, done_images=p.step * batch, step=p.step, epoch=p.epoch,
                      bar=o.bar)  # fmt: skip

    def _epoch_or_stop(self) -> Likelihood | None:
        try:
            return self._epoch()
        except Interrupted:
            self._save()
            raise

    def _epoch(self) -> Likelihood | None:
        p, o, began = self.progress, self.options, time.monotonic()
        self.train_loader.set_epoch(p.epoch, start_batch=p.batch)
        self.model.train()
        for x in self.train_loader:
            self._step(x.to(o.device, memory_format=torch.channels_last, non_blocking=True))
            self.stop_if_asked()
            due = o.save_every and p.step % o.save_every == 0 and p.batch < len(self.train_loader)
            if due and not int(self.step.skipped_in_a_row):  # the way back leads to weights that were seen to work
                self._save()
        total, count = self.processes.mean(self.loss).tolist()
        train_loss = total / count if count else math.nan
        epochs = self.config.training.epochs
        last = p.epoch == epochs - 1
        result = None
        if last or p.epoch % (1 if epochs <= 50 else 20) == 0:
            result = validate(self, train_loss, time.monotonic() - began)
        finite = result is not None and math.isfinite(result.nelbo)
        in_a_row = int(self.step.skipped_in_a_row)
        if in_a_row and result is not None and not finite:  # fewer than max_skipped, but the weights are of no use either
            raise Diverged(f"{in_a_row} steps in a row up to step {p.step} were not finite, and the validation is not either")
        p.epoch, p.batch = p.epoch + 1, 0
        self.loss.zero_()
        best = finite and (p.best is None or result.nelbo < p.best)
        if best:
            p.best = result.nelbo
        due = (p.epoch - 1) % math.ceil(epochs / 100) == 0
        if last or best or (due and (finite or not in_a_row)):
            self._save(best)
        return result

    def stop_if_asked(self) -> None:
        """At the boundary of a batch, in training or validation: raises Interrupted if a signal has come to any process."""
        received = self.processes.largest(self.stop.received or 0)
        if received:
            raise Interrupted(received)

    def _step(self, x: Tensor) -> None:
        """One optimiser step on a batch [B, C, H, W]."""
        c, p, o = self.config.training, self.progress, self.options
        rate, beta, lam = schedule(p, c, len(self.train_loader))
        at_once = o.device.type == "cpu"  # a GPU is not waited for at every step
        before = random_state(o.device) if at_once else None
        terms = self.step(x, rate=rate, kl_coeff=beta, norm_coeff=lam)
        taken = 1 - terms["skipped"].double()
        self.loss += torch.stack((terms["total"].double().nan_to_num() * taken, taken))
        p.step, p.batch = p.step + 1, p.batch + 1
        logged = p.step % o.log_every == 0 or p.batch == len(self.train_loader)
        in_a_row = self._read_counters(x, before, beta, lam) if logged or at_once else 0
        shown = {"skipped": str(self.skipped)} if self.skipped else {}
        if logged:
            values = torch.stack((terms["total"], terms["recon"].mean(), terms["kl"].mean())).double()
            loss, recon, kl = self.processes.mean(values).tolist()
            self.log.write(event="train", step=p.step, epoch=p.epoch, loss=loss, recon=recon, kl=kl, kl_coeff=beta, lr=rate,
                           norm_coeff=lam, spectral=terms["spectral"].item(), bn=terms["bn"].item(),
                           grad_norm=terms["grad_norm"].item(), skipped=self.skipped,
                           peak_memory=peak_memory(o.device))  # fmt: skip
            unit, value = readable(self.config, recon + kl)
            shown = {"epoch": f"{p.epoch + 1}/{c.epochs}", unit: value, "kl": f"{kl:.1f}", "lr": f"{rate:.1e}",
                     "mem": f"{peak_memory(o.device) / 2**20:.0f}M", **shown}  # fmt: skip
        self.log.advance(len(x) * self.processes.size, **shown)
        if in_a_row >= o.max_skipped:
            raise Diverged(f"{in_a_row} steps in a row up to step {p.step} had a non-finite loss or gradient")

    # ---- divergence ------------------------------------------------------------------------------------------------------

    def _read_counters(self, x: Tensor, before: dict[str, Tensor] | None, beta: float, lam: float) -> int:
        """The steps skipped in a row up to now; the first time, says which module the non-finite values come from."""
        p = self.progress
        self.skipped, in_a_row = int(self.step.skipped), int(self.step.skipped_in_a_row)
        if not in_a_row or self._diagnosed:
            return in_a_row
        self._diagnosed = True
        finding = diagnose(self.model, x, kl_coeff=beta, norm_coeff=lam, spectral=self.step.spectral,
                           precision=self.options.precision, random=before)  # fmt: skip
        found = [(rank, f) for rank, f in enumerate(self.processes.gather(finding)) if f is not None]
        rank, first = found[0] if found else (0, Finding("nowhere", "it did not happen again when the step was repeated"))
        where = f" on process {rank}" if self.processes.size > 1 and found else ""
        self.log.write(event="skipped", step=p.step, epoch=p.epoch, process=rank, where=first.where, what=first.what)
        self.log.say(f"step {p.step} was skipped: non-finite values{where}, first in {first.where}: {first.what}")
        return in_a_row

    def _roll_back(self, reason: str) -> None:
        """Go back to the last checkpoint with a lower learning rate and a stronger regulariser; RunError after too often."""
        advice = "raise --weight_decay_norm or lower --learning_rate; `nvae-fast doctor` looks for the cause"
        rollbacks = self.progress.rollbacks + 1
        start = self.checkpoints.latest()
        if rollbacks > ROLLBACKS or start is None:
            raise RunError(f"{reason}, after {rollbacks - 1} rollbacks; the last checkpoint stands: {advice}")
        at, skipped = self.progress.step, int(self.step.skipped)
        self._restore(start)
        p = self.progress
        p.rollbacks = rollbacks
        self.step.skipped.fill_(skipped)
        self.log.close()
        self.log = self._open_log()
        rate, norm = RATE_FACTOR**rollbacks, NORM_FACTOR**rollbacks
        self.log.write(event="rollback", step=p.step, epoch=p.epoch, from_step=at, reason=reason, rollbacks=rollbacks,
                       lr_factor=rate, norm_factor=norm, skipped=skipped)  # fmt: skip
        self.log.say(
            f"{reason}: back to step {p.step}, rollback {rollbacks} of {ROLLBACKS}, from now on with {rate:g} times the "
            f"learning rate and {norm:g} times lambda"
        )
        self._save()

    # ---- checkpoints -----------------------------------------------------------------------------------------------------

    def _restore(self, folder: Path) -> None:
        self.progress = restore(folder, self.step, self.loss, self.processes)
        if self.progress.step == 0:  # loading counts as initialised, but here no data have been seen
            for conv in self._from_data:
                conv.data_init_pending = True

    def _save(self, best: bool = False) -> None:
        p = self.progress
        if not all(t.isfinite().all() for t in self.model.parameters()):
            raise Diverged(f"the weights became infinite or NaN at step {p.step}")
        tensors, meta = training_state(self.step, p, self.loss, self.processes)
        if self.processes.main:
            self.checkpoints.save(self.model, tensors, meta, step=p.step, best=best)
        self.processes.barrier()


def schedule(p: Progress, c: TrainConfig, steps_per_epoch: int) -> tuple[float, float, float]:
    """(learning rate, KL coefficient, lambda) of the step that a run is at, rollbacks included."""
    rate = learning_rate(p.step, steps_per_epoch, c) * RATE_FACTOR**p.rollbacks
    beta = kl_coefficient(p.step, c.epochs * steps_per_epoch, c)
    lam = norm_coefficient(beta, c)
    return rate, beta, max(lam, LEAST_NORM) * NORM_FACTOR**p.rollbacks if p.rollbacks else lam


def settings(config: NVAEConfig, options: Options, train: ImageSource, valid: ImageSource, start: Path | None) -> dict:
    """What all processes of a run must have in common, by the name under which a user knows it."""
    model = config.to_dict()
    training = model.pop("training")
    training.pop("data")  # machines may have it at different places
    return {
        **model, **training, "precision": options.precision, "max_skipped": options.max_skipped,
        "save_every": options.save_every, "training images": len(train), "validation images": len(valid),
        "checkpoint": start.name if start else None, "torch": torch.__version__,
    }  # fmt: skip
