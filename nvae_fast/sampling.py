"""Images from a model: draws from the prior, BN re-adjustment for low temperatures, reconstructions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nvae_fast.errors import RunError
from nvae_fast.evaluation import eval_mode
from nvae_fast.layers import shared_effective_weights
from nvae_fast.model import NVAE


def show(model: NVAE, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The images [B, C, H, W] that stand for `logits`: the mean of a Bernoulli, a draw from any other distribution."""
    dist = model.decoder_output(logits)
    return dist.mean if model.config.output_likelihood == "bernoulli" else dist.sample(generator=generator)


@torch.no_grad()
def sample_images(
    model: NVAE, n: int, *, temperature: float | Sequence[float] = 1.0, batch_size: int = 64, seed: int = 0
) -> Tensor:
    """n images [n, C, H, W] in [0, 1] (on the CPU), drawn from the prior in eval mode; equal for equal seeds."""
    device = model.prior_ftr0.device
    generator = torch.Generator(device).manual_seed(seed)
    images = []
    with eval_mode(model), shared_effective_weights(model.convolutions()):
        for start in range(0, n, batch_size):
            logits = model.sample(min(batch_size, n - start), temperature, generator=generator)
            images.append(show(model, logits, generator).cpu())
    return torch.cat(images)


@torch.no_grad()
def reconstruct_images(model: NVAE, x: Tensor, *, seed: int = 0) -> Tensor:
    """The images [B, C, H, W] that a batch comes back as, through one posterior draw in eval mode."""
    device = model.prior_ftr0.device
    generator = torch.Generator(device).manual_seed(seed)
    noise = [torch.randn(len(x), *shape, generator=generator, device=device) for shape in model.config.latent_shapes]
    with eval_mode(model):
        return show(model, model(x.to(device), noise).logits, generator).cpu()


@torch.no_grad()
def readjust_bn(
    model: NVAE, *, temperature: float | Sequence[float], iterations: int = 500, batch_size: int = 16, seed: int = 0
) -> None:
    """Move the BN running statistics of the decoder to those of samples at `temperature`; leaves the model in eval mode.

    `iterations` prior passes in training mode, each moving them by the momentum 0.05. Encoder statistics stay as they are.
    """
    generator = torch.Generator(model.prior_ftr0.device).manual_seed(seed)
    model.train()
    with shared_effective_weights(model.convolutions()):
        for _ in range(iterations):
            model.sample(batch_size, temperature, generator=generator)
    model.eval()
    for name, value in model.named_buffers():
        if not torch.isfinite(value).all():
            raise RunError(
                f"BN re-adjustment made '{name}' non-finite at temperature {temperature}: sample in float32, without it"
            )
