"""Images from a model: draws from the prior, latents of images, and images of latents.

Latents are a list of tensors [B, Z, h, w], one per group, top-down (group 0 the smallest), after the flows if there are any:
what the decoder sees. Everything runs in eval mode and leaves the model's mode and the global random state alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from nvae_fast.errors import RunError
from nvae_fast.evaluation import eval_mode, noise_generator, noise_seed
from nvae_fast.folding import FoldedNVAE, folded
from nvae_fast.graph import CallGraph
from nvae_fast.layers import shared_effective_weights
from nvae_fast.model import NVAE

Temperature = float | Sequence[float]
REPLAYED = ("cuda",)  # kinds of devices that have graphs
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
    sampler = _Sampler(model, temperature, mean)
    for i in range(rank, -(-n // batch_size), world):
        yield sampler(min(batch_size, n - i * batch_size), noise_seed(seed, i))


class _Sampler:
    """Batches of images at one temperature: from the model folded, and anew where the caller has changed it in between; on a
    GPU replayed as a CUDA graph."""

    def __init__(self, model: NVAE, temperature: Temperature, mean: bool) -> None:
        self.model, self.settings = model, (temperature, mean)
        self.folded: FoldedNVAE | None = None
        self.draw: Callable[[int], dict[str, Tensor]] | None = None

    def __call__(self, n: int, seed: int) -> Tensor:
        """n images [n, C, H, W]."""
        if self.folded is None or self.folded.stale:
            self._fold()
        assert self.draw is not None
        self.generator.manual_seed(seed)
        return self.draw(n)["images"]

    def _fold(self) -> None:
        self.folded = self.draw = None  # before there are two of them
        with eval_mode(self.model):
            self.folded = folded(self.model)
        self.generator = torch.Generator(self.model.prior_ftr0.device)
        self.draw = partial(draw, self.folded, self.generator, *self.settings)
        if self.generator.device.type in REPLAYED:
            self.draw = CallGraph("sampling", self.draw, self.generator.device, generators=[self.generator])


@torch.no_grad()
def draw(model: NVAE, generator: torch.Generator | None, temperature: Temperature, mean: bool, n: int) -> dict[str, Tensor]:
    """n images of a model in eval mode as "images" [n, C, H, W], without waiting for the device."""
    logits = model.sample(n, temperature, generator=generator)
    return {"images": show(model, logits, generator, mean=mean)}


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
