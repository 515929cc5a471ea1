"""The validation at the end of an epoch: its likelihood, and pictures. The random state of training is left alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nvae_fast.config import NVAEConfig
from nvae_fast.evaluation import Likelihood, evaluate
from nvae_fast.images import save_grid, side_by_side
from nvae_fast.sampling import reconstruct_images, sample_images

if TYPE_CHECKING:
    from nvae_fast.training.loop import Trainer

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)


def readable(config: NVAEConfig, nats: float) -> tuple[str, str]:
    """-ELBO as people quote it: nats for binary data, bits/dim otherwise."""
    if config.output_likelihood == "bernoulli":
        return "nats", f"{nats:.2f}"
    return "bpd", f"{nats / (math.log(2) * config.data_dims):.3f}"


def validate(trainer: Trainer, train_loss: float, seconds: float) -> Likelihood:
    """Likelihood of the validation images over all processes, with averaged weights if there are any; written and drawn by the
    first process."""
    p, c, o, log = trainer.progress, trainer.config.training, trainer.options, trainer.log
    with trainer.step.optimizer.swapped_ema() if c.ema_decay else nullcontext():
        result = evaluate(trainer.model, _batches(trainer), num_iw_samples=o.valid_samples, seed=c.seed)
        if o.images and trainer.processes.main:
            _pictures(trainer)
    log.write(event="valid", step=p.step, epoch=p.epoch, train_loss=train_loss, nelbo=result.nelbo, nelbo_se=result.nelbo_se,
              neg_log_p=result.neg_log_p, recon=result.recon, kl=result.kl, nelbo_bpd=result.nelbo_bpd,
              neg_log_p_bpd=result.neg_log_p_bpd, active_channels=result.active_channels, kl_groups=result.kl_groups,
              active_by_group=result.active_by_group, **result.scalars(), seconds=round(seconds, 2))  # fmt: skip
    unit, value = readable(trainer.config, result.nelbo)
    log.say(
        f"epoch {p.epoch + 1}/{c.epochs}  valid {value} {unit}  (kl {result.kl:.1f} nats, {result.active_channels} active "
        f"channels)  train loss {train_loss:.2f}  {seconds:.0f} s"
    )
    return result


def _batches(trainer: Trainer) -> Iterator[Tensor]:
    """The validation batches of this process. It asks the others as long as any of them has one: shares may be unequal."""
    batches = iter(trainer.valid_loader)
    while True:
        x = next(batches, None)
        if not trainer.processes.largest(x is not None):
            return
        trainer.stop_if_asked()
        if x is not None:
            yield x


def _pictures(trainer: Trainer) -> None:
    """Grids of prior samples (a row per temperature) and of reconstructions of the first validation images."""
    p, model, folder = trainer.progress, trainer.model, trainer.options.out / "samples"
    samples = torch.cat([sample_images(model, 8, temperature=t, seed=trainer.config.training.seed) for t in TEMPERATURES])
    save_grid(samples, folder / f"epoch-{p.epoch + 1:04d}-samples.png", columns=8)
    x = next(iter(trainer.valid_loader))[:16]
    pairs = side_by_side(x, reconstruct_images(model, x), columns=8)
    save_grid(pairs, folder / f"epoch-{p.epoch + 1:04d}-reconstructions.png", columns=8)
    for name, images in (("samples", samples), ("reconstructions", pairs)):
        trainer.log.picture(name, torch.cat(list(images[:8]), 2), p.step)
