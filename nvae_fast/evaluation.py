"""Likelihood of a set of images: the ELBO and the importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nvae_fast.distributions import reduce_bits
from nvae_fast.errors import InputError
from nvae_fast.folding import folded
from nvae_fast.model import NVAE
from nvae_fast.objective import reconstruction_loss

ACTIVE = 0.1  # nats: a latent channel whose KL is above this says something about the image


class Likelihood(NamedTuple):
    """Averages over images, in nats and in bits/dim (nats / (ln 2 * data_dims)).

    `*_se` are the standard errors of these averages over images (nats): standard deviation / sqrt(images), NaN for one image.
    """

    nelbo: float  # reconstruction + KL, averaged over the posterior draws too
    neg_log_p: float  # -log of the mean importance weight: a tighter bound
    recon: float
    kl: float
    nelbo_bpd: float
    neg_log_p_bpd: float
    kl_groups: list[float]  # KL per group, top-down
    active_channels: int  # latent channels (of groups x Z) whose KL exceeds 0.1 nats
    images: int
    num_iw_samples: int
    nelbo_se: float
    neg_log_p_se: float
    active_by_group: list[int]  # active channels of each group, top-down

    def scalars(self) -> dict[str, float]:
        """The figures by group as flat names, `kl_group/00` and `active_group/00`, as TensorBoard takes them."""
        named = (("kl_group", self.kl_groups), ("active_group", self.active_by_group))
        return {f"{name}/{i:02d}": float(value) for name, values in named for i, value in enumerate(values)}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside the block; afterwards the mode is what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def ranks() -> tuple[int, int]:
    """(rank, world size) of this process; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """`value` summed over all processes, in place; itself when there is one."""
    if ranks()[1] > 1:
        dist.all_reduce(value)
    return value


def noise_generator(device: torch.device, seed: int, *stream: int) -> torch.Generator:
    """A generator for one purpose, started from `noise_seed`."""
    return torch.Generator(device).manual_seed(noise_seed(seed, *stream))


def noise_seed(seed: int, *stream: int) -> int:
    """`seed` itself for stream 0, else a hash of both, so that streams do not overlap."""
    return int(np.random.SeedSequence((seed, *stream)).generate_state(1)[0]) if any(stream) else seed


class _Sums:
    """Sums over images in float64, in one tensor: count, then -ELBO and -log p each with their squares, recon, KL, KL by
    group [N], KL by group and channel [N, Z]."""

    def __init__(self, model: NVAE, num_iw_samples: int) -> None:
        self.config, self.draws = model.config, num_iw_samples
        groups, z = len(model.config.latent_shapes), model.config.num_latent_per_group
        self.total = torch.zeros(7 + groups * (1 + z), dtype=torch.float64, device=model.prior_ftr0.device)

    def add(self, nelbo: Tensor, neg_log_p: Tensor, recon: Tensor, kl_groups: Tensor, kl_diag: Tensor) -> None:
        """nelbo, neg_log_p, recon: [B]; kl_groups [N] and kl_diag [N, Z] summed over the images."""
        nelbo, neg_log_p, recon = nelbo.double(), neg_log_p.double(), recon.double()
        seven = (torch.full_like(nelbo, 1), nelbo, nelbo**2, neg_log_p, neg_log_p**2, recon, nelbo - recon)
        self.total += torch.cat([torch.stack([t.sum() for t in seven]), kl_groups.double(), kl_diag.double().flatten()])

    def result(self, total: Tensor) -> Likelihood:
        count, nelbo, nelbo2, neg_log_p, neg_log_p2, recon, kl, *rest = total.tolist()
        groups = len(self.config.latent_shapes)
        kl_groups, kl_diag = np.array(rest[:groups]) / count, np.array(rest[groups:]).reshape(groups, -1) / count
        active = (kl_diag > ACTIVE).sum(1)
        bits = math.log(2) * self.config.data_dims * count
        return Likelihood(nelbo / count, neg_log_p / count, recon / count, kl / count, nelbo / bits, neg_log_p / bits,
                          kl_groups.tolist(), int(active.sum()), round(count), self.draws,
                          standard_error(count, nelbo, nelbo2), standard_error(count, neg_log_p, neg_log_p2),
                          active.tolist())  # fmt: skip


def standard_error(count: float, total: float, squares: float) -> float:
    """That of a mean, from the sum and the sum of squares of `count` values; NaN below two."""
    if count < 2:
        return math.nan
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0) / (count - 1))


@torch.no_grad()
def evaluate(model: NVAE, batches: Iterable[Tensor], *, num_iw_samples: int = 1, seed: int = 0, rows: int = 256,
             progress: Callable[[Likelihood], None] | None = None) -> Likelihood:  # fmt: skip
    """-ELBO and -log p(x) ~ -(logsumexp_k log w_k - ln K) with K = `num_iw_samples` draws per image, in eval mode.

    log w = log p(x|z) + log p(z) - log q(z|x) (Burda et al. 2016, IWAE). The bottom-up pass runs once per image; draws of an
    image go side by side through the top-down pass, at most max(`rows`, batch size) images x draws at a time, fewer when GPU
    memory runs out. Noise comes from `seed` (and the rank) alone, whatever `rows` is; the global random state stays as it was.

    batches: images [B, C, H, W] in [0, 1]; under torch.distributed those of this rank, all ranks call this, and all get the
    result over all images. `progress` is called with this rank's running estimate after every batch.

    Raises InputError when there are no images.
    """
    if num_iw_samples < 1:
        raise InputError(f"num_iw_samples={num_iw_samples} must be at least 1")
    config, device = model.config, model.prior_ftr0.device
    generator = noise_generator(device, seed, ranks()[0])
    sums = _Sums(model, num_iw_samples)
    with eval_mode(model):
        model = folded(model)
        for x in batches:
            if not len(x):
                continue
            x = x.to(device, memory_format=torch.channels_last)
            features = model.bottom_up(x)
            target = reduce_bits(x, config.num_x_bits)
            log_w, recon, kl_groups, kl_diag = [], 0, 0, 0
            for out, rec in _draws(model, features, target, num_iw_samples, rows, generator):
                log_w.append((-rec - out.log_q + out.log_p).view(-1, len(x)))
                recon = recon + rec.double().view(-1, len(x)).sum(0) / num_iw_samples
                kl_groups = kl_groups + out.kl_all.double().unflatten(1, (-1, len(x))).sum(1) / num_iw_samples  # [N, B]
                kl_diag = kl_diag + out.kl_diag.double() * (len(rec) / num_iw_samples)
            neg_log_p = math.log(num_iw_samples) - torch.cat(log_w).double().logsumexp(0)
            sums.add(recon + kl_groups.sum(0), neg_log_p, recon, kl_groups.sum(1), kl_diag)
            if progress is not None:
                progress(sums.result(sums.total))
    total = sum_over_ranks(sums.total)
    if not total[0] > 0:
        raise InputError("no images to evaluate: name a set that has some")
    return sums.result(total)


def _draws(model: NVAE, features: Sequence[Tensor], target: Tensor, count: int, rows: int, generator: torch.Generator):
    """`count` posterior passes over a batch, several at a time: (NVAEOutput, reconstruction loss [g B]), draws outermost."""
    batch, device = len(target), target.device
    together, done = max(1, rows // max(batch, 1)), 0
    while done < count:
        g = min(together, count - done)
        state = generator.get_state()
        try:
            noise = [[torch.randn(batch, *shape, generator=generator, device=device) for shape in model.config.latent_shapes]
                     for _ in range(g)]  # fmt: skip
            wide = [torch.cat([f] * g) if g > 1 else f for f in features]
            out = model.decode_posterior(wide, [torch.cat(draws) for draws in zip(*noise, strict=True)])
            repeated = torch.cat([target] * g) if g > 1 else target
            recon = reconstruction_loss(model.decoder_output(out.logits), repeated, model.config.padding)
        except torch.OutOfMemoryError:
            if g == 1:
                raise
            generator.set_state(state)
            noise = wide = out = repeated = None  # what is left of the attempt would be in the way of the next one
            together = g // 2
            continue
        done += g
        yield out, recon
