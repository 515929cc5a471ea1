"""Latents as something to move in and to keep: interpolation, traversal, and their file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nvae_fast import functional as F
from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.errors import InputError
from nvae_fast.evaluation import noise_generator
from nvae_fast.model import NVAE
from nvae_fast.sampling import decode, encode, passes

FORMAT = "nvae_fast latents 1"


def mix(a: Tensor, b: Tensor, t: float, path: str = "linear") -> Tensor:
    """The point at t in [0, 1] on the way from a to b, [B, Z, h, w], image by image.

    linear: (1 - t) a + t b. spherical (Shoemake 1985, on vectors of any length): (sin((1 - t) w) a + sin(t w) b) / sin(w) with
    w the angle between a and b as vectors of Z h w numbers, cos w = <a, b> / (|a| |b|); it keeps the length where |a| = |b|,
    which a linear mix does not. Linear where sin w < 1e-4: there both agree. Exactly a at t = 0 and b at t = 1.
    """
    if path not in ("linear", "spherical"):
        raise InputError(f"path '{path}': expected linear or spherical")
    if t in (0.0, 1.0):
        return b.clone() if t else a.clone()
    linear = (1 - t) * a + t * b
    if path == "linear":
        return linear
    u, v = a.flatten(1).double(), b.flatten(1).double()
    cosine = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1)).clamp_min(1e-300)
    angle = torch.arccos(cosine.clamp(-1, 1)).view(-1, 1, 1, 1)
    sine = angle.sin()
    curved = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine.clamp_min(1e-30)
    return torch.where(sine < 1e-4, linear, curved.to(a.dtype))


def interpolate(model: NVAE, a: Tensor, b: Tensor, steps: int, *, path: str = "linear", groups: Sequence[int] | None = None,
                seed: int = 0, mean_latents: bool = False, mean_pixels: bool = False) -> Tensor:  # fmt: skip
    """Images [B, steps, C, H, W] on the way from images a to images b, [B, C, H, W] each: the latents of the groups in
    `groups` (None: all) are mixed at t = 0, 1 / (steps - 1), ..., 1 (see `mix`), those of the others stay a's."""
    if steps < 2:
        raise InputError(f"steps={steps}: expected 2 or more, the two ends among them")
    moving = _groups(model, groups)
    ends = [encode(model, x, seed=seed, mean=mean_latents) for x in (a, b)]
    images = []
    for i in range(steps):
        t = i / (steps - 1)
        pairs = enumerate(zip(*ends, strict=True))
        z = [mix(za, zb, t, path) if g in moving else za for g, (za, zb) in pairs]
        images.append(decode(model, z, seed=seed, mean=mean_pixels))
    return torch.stack(images, 1)


def traverse(model: NVAE, latents: Sequence[Tensor], group: int, steps: int, *, reach: float | None = None,
             channel: int | None = None, temperature: float = 1.0, seed: int = 0,
             mean_pixels: bool = False) -> Tensor:  # fmt: skip
    """Images [B, steps, C, H, W] of `latents` with only the latent z of one group varied, all others held as they are.

    mu and sigma are those of the group's prior given the groups above it, Normal(mu, sigma). reach None: z is drawn anew,
    z = mu + temperature * sigma * e with e ~ N(0, 1), the first column being the given z. Otherwise the columns run along a
    direction d, z + s * sigma * d for s from -reach to reach, d ~ N(0, 1) drawn once; with `channel`, redraws and moves touch
    that channel of z alone, and d is 1 throughout it.
    """
    (index,) = _groups(model, [group])
    depth = model.config.num_latent_per_group
    if channel is not None and not 0 <= channel < depth:
        raise InputError(f"channel {channel}: the groups of this model have channels 0 to {depth - 1}")
    if steps < 1:
        raise InputError(f"steps={steps}: expected 1 or more")
    if reach is not None and not math.isfinite(reach):
        raise InputError(f"reach {reach}: expected a finite number of prior sigmas, as 3")
    with passes(model) as device:
        latents = [z.to(device) for z in latents]
        batch, z = len(latents[0]), latents[index]
        mu_sigma: list[Tensor] = []

        def given(i: int, h: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if i == index:
                raw = torch.zeros_like(torch.cat([z, z], 1)) if h is None else model.dec_sampler[i - 1](h)
                mu_sigma.extend(F.normal_params(*raw.chunk(2, dim=1)))
            return latents[i], h

        model._top_down(given, batch)
        mu, sigma = (t.to(z.dtype) for t in mu_sigma)
        generator = noise_generator(device, seed, 2)
        mask = torch.zeros_like(z)
        mask[:, slice(None) if channel is None else channel] = 1
        direction = torch.randn(z.shape, generator=generator, device=device) if channel is None else 1.0
        columns = []
        for i in range(steps):
            if reach is not None:
                s = 0.0 if steps == 1 else reach * (2 * i / (steps - 1) - 1)
                columns.append(z + mask * (s * sigma * direction))
            elif i == 0:
                columns.append(z)
            else:
                drawn = mu + temperature * sigma * torch.randn(z.shape, generator=generator, device=device)
                columns.append(torch.where(mask > 0, drawn, z))
    varied = ([*latents[:index], moved, *latents[index + 1 :]] for moved in columns)
    return torch.stack([decode(model, each, seed=seed, mean=mean_pixels) for each in varied], 1)


def _groups(model: NVAE, groups: Sequence[int] | None) -> set[int]:
    count = len(model.config.latent_shapes)
    for g in groups or ():
        if not 0 <= g < count:
            raise InputError(f"group {g}: this model has groups 0 (the smallest latents) to {count - 1}")
    return set(range(count)) if groups is None else set(groups)


def save_latents(path: str | Path, latents: Sequence[Tensor], about: Mapping[str, Any]) -> None:
    """Write latents to a safetensors file, `latent/000` and so on, with `about` (JSON values, the `seed` of their draw among
    them) as its metadata."""
    named = {f"latent/{i:03d}": z.detach().cpu().contiguous() for i, z in enumerate(latents)}
    metadata = {"format": FORMAT, **{k: json.dumps(v) for k, v in about.items()}}
    atomic_write(path, lambda file: file.write(save(named, metadata)))


def load_latents(path: str | Path, model: NVAE) -> tuple[list[Tensor], dict[str, Any]]:
    """(latents, what `save_latents` was told about them); InputError unless they are finite latents of this model."""
    try:
        with safe_open(path, framework="pt") as file:
            about = dict(file.metadata() or {})
            if about.pop("format", None) != FORMAT:
                raise InputError(f"'{path}' holds no latents: give a file that nvae-fast encode wrote")
            latents = [file.get_tensor(name) for name in sorted(file.keys())]
            values = {k: json.loads(v) for k, v in about.items()}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read latents from '{path}' ({error}): give a file that nvae-fast encode wrote") from None
    shapes, given = model.config.latent_shapes, [tuple(z.shape[1:]) for z in latents]
    if given != shapes or len({len(z) for z in latents}) != 1 or not all(z.is_floating_point() for z in latents):
        raise InputError(f"'{path}' holds latents of shapes {given}: this model's are {shapes}; give it its own latents")
    if not isinstance(values.get("seed"), int) or values["seed"] < 0:
        raise InputError(f"'{path}' does not say which seed its latents were drawn with: encode the images again")
    if not all(z.isfinite().all() for z in latents):
        raise InputError(f"'{path}' holds latents that are NaN or infinite: encode the images again")
    return latents, values
