"""Likelihood of a set of images: the ELBO and the importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvae_fast.distributions import reduce_bits
from nvae_fast.layers import shared_effective_weights
from nvae_fast.model import NVAE
from nvae_fast.objective import reconstruction_loss


class Likelihood(NamedTuple):
    """Averages over images, in nats and in bits/dim (nats / (ln 2 * data_dims))."""

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


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` inside the block; afterwards the mode is what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@torch.no_grad()
def evaluate(model: NVAE, batches: Iterable[Tensor], *, num_iw_samples: int = 1, seed: int = 0) -> Likelihood:
    """-ELBO and -log p(x) ~ -(logsumexp_k log w_k - ln K) with K = `num_iw_samples` draws per image, in eval mode.

    log w = log p(x|z) + log p(z) - log q(z|x). The bottom-up pass runs once per image. Noise comes from `seed` alone, the
    global random state is left as it was.
    """
    device, config = model.prior_ftr0.device, model.config
    shapes = config.latent_shapes
    generator = torch.Generator(device).manual_seed(seed)
    sums = torch.zeros(4, dtype=torch.float64)
    kl_groups = torch.zeros(len(shapes), dtype=torch.float64)
    kl_diag = torch.zeros(len(shapes), config.num_latent_per_group, dtype=torch.float64)
    images = 0
    with eval_mode(model), shared_effective_weights(model.convolutions()):
        for x in batches:
            x = x.to(device)
            features = model.bottom_up(x)
            target = reduce_bits(x, config.num_x_bits)
            log_w = []
            for _ in range(num_iw_samples):
                noise = [torch.randn(len(x), *shape, generator=generator, device=device) for shape in shapes]
                out = model.decode_posterior(features, noise)
                recon = reconstruction_loss(model.decoder_output(out.logits), target, config.padding)
                log_w.append(-recon - out.log_q + out.log_p)
                kl = out.kl_all.sum(0)
                sums[:3] += torch.stack([(recon + kl).sum(), recon.sum(), kl.sum()]).double().cpu() / num_iw_samples
                kl_groups += out.kl_all.sum(1).double().cpu() / num_iw_samples
                kl_diag += out.kl_diag.double().cpu() * (len(x) / num_iw_samples)
            sums[3] -= (torch.stack(log_w).logsumexp(0) - math.log(num_iw_samples)).sum().double().cpu()
            images += len(x)
    nelbo, recon, kl, neg_log_p = (sums / images).tolist()
    bits = math.log(2) * config.data_dims
    return Likelihood(nelbo, neg_log_p, recon, kl, nelbo / bits, neg_log_p / bits, (kl_groups / images).tolist(),
                      int((kl_diag / images > 0.1).sum()), images, num_iw_samples)  # fmt: skip
