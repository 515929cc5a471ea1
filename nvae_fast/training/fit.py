"""Whether a training step fits into memory, and the largest batch that does."""

from __future__ import annotations

import os

from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.estimate import Footprint, Tracer, available_memory
from nvae_fast.training.distributed import Processes

LARGEST = 1024  # images of a process that `--batch_size auto` takes at most
SHARE = 0.9  # of the memory that is there; allocators, libraries and the process itself take the rest
ACTIVATIONS, PARAMETERS = 24, 16  # numbers that a cell of C channels keeps, in C H W, and has, in C^2: more than any does


def bound(config: NVAEConfig) -> tuple[int, int]:
    """(bytes of weights, gradients and optimiser, bytes of an image): more than a step takes, from the configuration alone."""
    c, p = config, config.num_preprocess_blocks
    cells = dict.fromkeys(range(p), c.num_preprocess_cells + c.num_postprocess_cells)
    groups = dict(enumerate(c.groups_per_scale, p))  # by how often the side was halved
    cells |= {level: n * (c.num_cell_per_cond_enc + c.num_cell_per_cond_dec + 2) + 3 for level, n in groups.items()}
    height, width = c.image_size
    channels, pixels, z = max(c.num_channels_enc, c.num_channels_dec), height * width, c.num_latent_per_group
    outputs = (2 + 3 * c.channels) * max(c.num_mixture_dec, 1) + c.channels
    numbers, weights = 12 * outputs * pixels, 50 * channels * outputs
    for level, n in cells.items():
        flows = groups.get(level, 0) * (1 + c.num_nf)
        numbers += ACTIVATIONS * (n * channels * pixels / 2**level + flows * z * pixels / 4**level)
        weights += PARAMETERS * n * (channels * 2**level) ** 2 + 400 * flows * z * (z + channels * 2**level)
    return round(weights) * 4 * (4 + bool(c.training.ema_decay)), round(numbers) * 4


def budget(processes: Processes) -> int:
    """Bytes that a process may fill: of its GPU, else its share of the machine."""
    together = 1 if processes.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE") or processes.size)
    return round(SHARE * available_memory(processes.device) / together)


def trace(config: NVAEConfig, memory: str, precision: str, processes: Processes, batch: int) -> tuple[Footprint, Footprint]:
    """What a step on `batch` images takes, in parts of `accumulate`: in the memory mode `memory`, and in "low"."""
    tracer = Tracer(config, precision=precision, ema=bool(config.training.ema_decay))
    found = tracer.footprint(memory, max(batch // config.training.accumulate, 1))
    low = found if memory == "low" else tracer.footprint("low", found.batch)
    buckets = found.gradients if processes.size > 1 else 0  # of DistributedDataParallel
    return found._replace(peak=found.peak + buckets), low._replace(peak=low.peak + buckets)


def largest_batch(config: NVAEConfig, images: int, memory: str, precision: str, processes: Processes) -> int:
    """The largest --batch_size of each process that fits, at most LARGEST and the share of the `images`. All call it."""
    parts, room = config.training.accumulate, budget(processes)
    most = min(LARGEST, images // processes.size) // parts
    fixed, each = bound(config)
    if most and fixed + most * each > room:
        # The peak is a maximum of straight lines: between two images and the most, it lies below the line that is taken.
        found, _ = trace(config, memory, precision, processes, most * parts)
        most = min(most, found.largest_batch(room))
    most = -processes.largest(-most) * parts
    if most < 1:
        raise InputError(
            f"--batch_size auto: not one image for each of {parts} part(s) fits into {_gib(room)}, of {images} on "
            f"{processes.size} process(es): use --memory low, a smaller model or more images"
        )
    return most


def check_fits(config: NVAEConfig, memory: str, precision: str, processes: Processes) -> None:
    """InputError, with the settings that would do, for a step that cannot fit. Traced only when `bound` leaves it open."""
    batch, parts, room = config.training.batch_size, config.training.accumulate, budget(processes)
    fixed, each = bound(config)
    if fixed + max(batch // parts, 1) * each <= room:
        return
    found, low = trace(config, memory, precision, processes, batch)
    if found.peak <= room:
        return
    cures = ["--memory low"] if low.peak <= room else []
    if smaller := low.largest_batch(room):
        fits = found.largest_batch(room)
        cures.append(f"--batch_size {fits * parts} or less" if fits else f"--memory low --batch_size {smaller * parts} or less")
    raise InputError(
        f"a step on {batch} images takes {_gib(found.peak)} in --memory {memory}, and there are {_gib(room)}: use "
        + (" or ".join(cures) or "a smaller model: one image alone does not fit")
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
