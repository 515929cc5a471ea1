"""The training loop: steps, validation, pictures, checkpoints, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_write, writing
from nvae_fast.checkpoint.native import CONFIG, json_bytes, read_config
from nvae_fast.config import NVAEConfig
from nvae_fast.data import ImageSource
from nvae_fast.errors import InputError, RunError
from nvae_fast.evaluation import Likelihood, evaluate
from nvae_fast.images import save_grid, side_by_side
from nvae_fast.model import NVAE
from nvae_fast.objective import kl_coefficient, learning_rate, norm_coefficient
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.sampling import reconstruct_images, sample_images
from nvae_fast.training.data import loader
from nvae_fast.training.log import RunLog, peak_memory
from nvae_fast.training.signals import Interrupted, StopSignals
from nvae_fast.training.state import Checkpoints, Progress, restore, training_state
from nvae_fast.training.step import TrainingStep

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)


@dataclass
class Options:
    """How to run, as opposed to what: nothing here changes the numbers of a CPU run in float32."""

    out: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    precision: str = "fp32"  # or bf16: autocast of the forward pass and the loss
    memory: str = "balanced"  # what cells keep for backward: fast, balanced or low
    resume: str | None = None  # None: a new run; "auto": go on if there is something to go on with; or a checkpoint folder
    workers: int = 0
    log_every: int = 10  # steps between two lines of metrics.jsonl
    valid_samples: int = 1  # importance samples in the validation
    images: bool = True
    bar: bool = True


class Trainer:
    """Trains the model of `config` on `train` (an ImageSource), validating on `valid`, into the folder `options.out`."""

    def __init__(self, config: NVAEConfig, train: ImageSource, valid: ImageSource, options: Options) -> None:
        self.config, self.options = config, options
        c = config.training
        self.checkpoints = Checkpoints(options.out / "checkpoints")
        start = self._starting_point()
        torch.manual_seed(c.seed)
        np.random.seed(c.seed % 2**32)
        self.model = NVAE(config).to(options.device, memory_format=torch.channels_last)
        self.model.set_memory(options.memory)
        self.optimizer = make_optimizer(self.model)
        self.spectral = SpectralState(c.seed)
        self.step = TrainingStep(self.model, self.optimizer, self.spectral, precision=options.precision)
        self.train_loader = loader(config, train, train=True, workers=options.workers, device=options.device)
        self.valid_loader = loader(config, valid, train=False, workers=options.workers, device=options.device)
        self.progress = Progress()
        if start is not None:
            p = self.progress = restore(start, self.model, self.optimizer, self.spectral)
            steps = len(self.train_loader)
            if p.step != p.epoch * steps + p.batch or p.batch > steps:
                raise InputError(
                    f"'{start}' does not fit '{train.name}': {len(train)} images make {steps} steps an epoch, and its step "
                    f"{p.step} is not batch {p.batch} of epoch {p.epoch}; resume with the data it was trained on"
                )
        with writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        atomic_write(options.out / CONFIG, lambda file: file.write(json_bytes(config.to_dict())))

    def _starting_point(self) -> Path | None:
        """The checkpoint folder to resume from, if any; refuses to mix two runs in one folder."""
        out, resume = self.options.out, self.options.resume
        start = self.checkpoints.latest() if resume in (None, "auto") else self.checkpoints.resolve(resume)
        if resume is None and start is not None:
            raise InputError(f"'{out}' already holds a run: continue it with --resume auto, or choose another --out")
        if start is not None:
            if self.checkpoints.latest() is not None and start.resolve().parent != self.checkpoints.folder.resolve():
                raise InputError(f"'{out}' already holds another run than that of '{start}': choose another --out")
            saved, now = read_config(start).to_dict(), self.config.to_dict()
            for part, old, new in (("", saved, now), ("training ", saved["training"], now["training"])):
                for name in old:
                    if name not in ("training", "name", "data") and old[name] != new[name]:
                        raise InputError(
                            f"'{start}' was trained with {part}{name}={old[name]}, not {new[name]}: resume with its settings, "
                            "or choose another --out"
                        )
        return start

    @property
    def total_steps(self) -> int:
        return self.config.training.epochs * len(self.train_loader)

    def run(self) -> Likelihood | None:
        """Train to the last epoch; the last validation. Raises Interrupted after saving, when asked to stop."""
        o, p = self.options, self.progress
        batch = self.config.training.batch_size
        self.checkpoints.tidy()
        self.log = RunLog(o.out, total_images=self.total_steps * batch, done_images=p.step * batch, step=p.step,
                          epoch=p.epoch, bar=o.bar)  # fmt: skip
        result = None
        try:
            with StopSignals() as self.stop:
                while p.epoch < self.config.training.epochs:
                    result = self._epoch() or result
        finally:
            self.log.close()
        return result

    def _epoch(self) -> Likelihood | None:
        p, began = self.progress, time.monotonic()
        self.train_loader.set_epoch(p.epoch, start_batch=p.batch)
        self.model.train()
        for x in self.train_loader:
            self._step(x.to(self.options.device, memory_format=torch.channels_last, non_blocking=True))
            self._stop_if_asked()
        steps = len(self.train_loader)
        train_loss = p.loss_sum / steps
        epochs = self.config.training.epochs
        last = p.epoch == epochs - 1
        result = None
        if last or p.epoch % (1 if epochs <= 50 else 20) == 0:
            result = self._validate(train_loss, time.monotonic() - began)
        p.epoch, p.batch, p.loss_sum = p.epoch + 1, 0, 0.0
        best = result is not None and math.isfinite(result.nelbo) and (p.best is None or result.nelbo < p.best)
        if best:
            p.best = result.nelbo
        if last or best or (p.epoch - 1) % math.ceil(epochs / 100) == 0:
            self._save(best)
        return result

    def _stop_if_asked(self) -> None:
        """At the boundary of a batch, in training or validation: save and raise Interrupted if a signal has come."""
        if self.stop.received is not None:
            self._save()
            raise Interrupted(self.stop.received)

    def _step(self, x: Tensor) -> None:
        """One optimiser step on a batch [B, C, H, W]."""
        c, p, o = self.config.training, self.progress, self.options
        rate = learning_rate(p.step, len(self.train_loader), c)
        beta = kl_coefficient(p.step, self.total_steps, c)
        lam = norm_coefficient(beta, c)
        terms = self.step(x, rate=rate, kl_coeff=beta, norm_coeff=lam)
        loss, spectral, bn = (terms[name].item() for name in ("total", "spectral", "bn"))
        if not math.isfinite(loss):
            raise RunError(
                f"the loss became {loss} at step {p.step} (epoch {p.epoch}); the last checkpoint stands: raise "
                "--weight_decay_norm or lower --learning_rate"
            )
        p.step, p.batch, p.loss_sum = p.step + 1, p.batch + 1, p.loss_sum + loss
        shown = {}
        if p.step % o.log_every == 0 or p.batch == len(self.train_loader):
            recon, kl = terms["recon"].mean().item(), terms["kl"].mean().item()
            self.log.write(event="train", step=p.step, epoch=p.epoch, loss=loss, recon=recon, kl=kl,
                           kl_coeff=beta, lr=rate, norm_coeff=lam, spectral=spectral, bn=bn,
                           peak_memory=peak_memory(o.device))  # fmt: skip
            shown = {"epoch": f"{p.epoch + 1}/{c.epochs}", **self._readable(recon + kl), "kl": f"{kl:.1f}", "lr": f"{rate:.1e}",
                     "mem": f"{peak_memory(o.device) / 2**20:.0f}M"}  # fmt: skip
        self.log.advance(len(x), **shown)

    def _readable(self, nats: float) -> dict[str, str]:
        """-ELBO as people quote it: nats for binary data, bits/dim otherwise."""
        if self.config.output_likelihood == "bernoulli":
            return {"nats": f"{nats:.2f}"}
        return {"bpd": f"{nats / (math.log(2) * self.config.data_dims):.3f}"}

    def _validate(self, train_loss: float, seconds: float) -> Likelihood:
        """Likelihood of the validation images, and pictures; the random state of training is left alone."""
        p, c, o = self.progress, self.config.training, self.options
        result = evaluate(self.model, self._valid_batches(), num_iw_samples=o.valid_samples, seed=c.seed)
        self.log.write(event="valid", step=p.step, epoch=p.epoch, train_loss=train_loss, nelbo=result.nelbo,
                       neg_log_p=result.neg_log_p, recon=result.recon, kl=result.kl, nelbo_bpd=result.nelbo_bpd,
                       neg_log_p_bpd=result.neg_log_p_bpd, active_channels=result.active_channels,
                       kl_groups=result.kl_groups, seconds=round(seconds, 2))  # fmt: skip
        unit, value = next(iter(self._readable(result.nelbo).items()))
        self.log.say(
            f"epoch {p.epoch + 1}/{c.epochs}  valid {value} {unit}  (kl {result.kl:.1f} nats, {result.active_channels} active "
            f"channels)  train loss {train_loss:.2f}  {seconds:.0f} s"
        )
        if o.images:
            self._pictures()
        return result

    def _valid_batches(self) -> Iterator[Tensor]:
        for x in self.valid_loader:
            self._stop_if_asked()
            yield x

    def _pictures(self) -> None:
        """Grids of prior samples (a row per temperature) and of reconstructions of the first validation images."""
        p, folder = self.progress, self.options.out / "samples"
        samples = torch.cat([sample_images(self.model, 8, temperature=t, seed=self.config.training.seed) for t in TEMPERATURES])
        save_grid(samples, folder / f"epoch-{p.epoch + 1:04d}-samples.png", columns=8)
        x = next(iter(self.valid_loader))[:16]
        pairs = side_by_side(x, reconstruct_images(self.model, x), columns=8)
        save_grid(pairs, folder / f"epoch-{p.epoch + 1:04d}-reconstructions.png", columns=8)
        for name, images in (("samples", samples), ("reconstructions", pairs)):
            self.log.picture(name, torch.cat(list(images[:8]), 2), p.step)

    def _save(self, best: bool = False) -> None:
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise RunError(
                f"the weights became infinite or NaN at step {self.progress.step}; the last checkpoint stands: raise "
                "--weight_decay_norm or lower --learning_rate"
            )
        tensors, meta = training_state(self.model, self.optimizer, self.spectral, self.progress)
        self.checkpoints.save(self.model, tensors, meta, step=self.progress.step, best=best)
