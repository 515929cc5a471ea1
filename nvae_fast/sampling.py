"""Images from a model: draws from the prior, latents of images, and images of latents.

Latents are a list of tensors [B, Z, h, w], one per group, top-down (group 0 the smallest), after the flows if there are any:
what the decoder sees. Everything runs in eval mode and leaves the model's mode and the global random state alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nvae_fast.errors import RunError
from nvae_fast.evaluation import eval_mode, noise_generator
from nvae_fast.layers import shared_effective_weights
from nvae_fast.model import NVAE

Temperature = float | Sequence[float]
PIXELS = 1  # the stream of random numbers that pixels of given latents are drawn from; latents have stream 0


@contextmanager
def passes(model: NVAE) -> Iterator[torch.device]:
    """Passes of a trained model: eval mode, no gradients, weights normalised once; the model's device."""
    with torch.no_grad(), eval_mode(model), shared_effective_weights(model.convolutions()):
        yield model.prior_ftr0.device


def show(model: NVAE, logits: Tensor, generator: torch.Generator | None = None, *, mean: bool = False) -> Tensor:
    """The images [B, C, H, W] in [0, 1] that `logits` stand for: the mean of a Bernoulli, and of any other distribution a draw,
    or with `mean` its mean."""
    dist = model.decoder_output(logits)
    images = dist.mean if mean or model.config.output_likelihood == "bernoulli" else dist.sample(generator=generator)
    return images.clamp(0, 1)


def check_finite(images: Tensor) -> Tensor:
    """The images [N, C, H, W] themselves; RunError if some hold NaN or infinite pixels."""
    bad = int((~images.isfinite()).flatten(1).any(1).sum()) if images.numel() else 0
    if bad:
        raise RunError(
            f"{bad} of {len(images)} images hold NaN or infinite pixels: sample without --readjust-bn, at a higher "
            "--temperature, or from an earlier checkpoint"
        )
    return images


def sample_batches(model: NVAE, n: int, *, temperature: Temperature = 1.0, batch_size: int = 64, seed: int = 0,
                   mean: bool = False, part: tuple[int, int] = (0, 1)) -> Iterator[Tensor]:  # fmt: skip
    """n images in batches [B, C, H, W] in [0, 1] on the model's device, drawn from the prior in eval mode.

    A batch depends on seed, batch_size and its number alone; `part` (rank, world size) picks every world-th one, so that all
    ranks together draw the images that one process would. `temperature` scales every prior sigma: a number, or one per group,
    top-down. `mean` takes pixel means instead of draws.
    """
    rank, world = part
    for i in range(rank, -(-n // batch_size), world):
        with passes(model) as device:  # entered anew for every batch: in between the caller does what it likes with the model
            generator = noise_generator(device, seed, i)
            logits = model.sample(min(batch_size, n - i * batch_size), temperature, generator=generator)
            images = show(model, logits, generator, mean=mean)
        yield images


def sample_images(model: NVAE, n: int, *, temperature: Temperature = 1.0, batch_size: int = 64, seed: int = 0,
                  mean: bool = False) -> Tensor:  # fmt: skip
    """`sample_batches` in one tensor [n, C, H, W] on the CPU."""
    batches = sample_batches(model, n, temperature=temperature, batch_size=batch_size, seed=seed, mean=mean)
    return torch.cat([images.cpu() for images in batches])


def encode(model: NVAE, x: Tensor, *, seed: int = 0, mean: bool = False) -> list[Tensor]:
    """The latents of images [B, C, H, W] in [0, 1]: a posterior draw that depends on `seed` alone, or with `mean` the mean of
    each group's posterior given the means above it."""
    with passes(model) as device:
        generator = noise_generator(device, seed)
        shapes = [(len(x), *shape) for shape in model.config.latent_shapes]
        noise = [torch.zeros(s, device=device) if mean else torch.randn(s, generator=generator, device=device) for s in shapes]
        latents: list[Tensor] = []
        features = model.bottom_up(x.to(device, memory_format=torch.channels_last))
        model.decode_posterior(features, noise, latents)
    return latents


def decode(model: NVAE, latents: Sequence[Tensor], *, seed: int = 0, mean: bool = False) -> Tensor:
    """The images [B, C, H, W] in [0, 1] (on the CPU) of latents: the mean of a Bernoulli; otherwise a draw that depends on
    `seed` alone, or with `mean` the mean."""
    with passes(model) as device:
        logits = model.decode([z.to(device) for z in latents])
        return show(model, logits, noise_generator(device, seed, PIXELS), mean=mean).cpu()


def reconstruct_images(model: NVAE, x: Tensor, *, seed: int = 0, mean_latents: bool = False,
                       mean_pixels: bool = False) -> Tensor:  # fmt: skip
    """`decode(encode(x))`: the images [B, C, H, W] (on the CPU) that a batch comes back as."""
    return decode(model, encode(model, x, seed=seed, mean=mean_latents), seed=seed, mean=mean_pixels)
