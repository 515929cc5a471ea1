"""BN re-adjustment: running statistics that fit samples at a low temperature, and the file that keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.errors import InputError
from nvae_fast.evaluation import noise_generator
from nvae_fast.layers import shared_effective_weights
from nvae_fast.model import NVAE
from nvae_fast.sampling import Temperature


@torch.no_grad()
def readjust_bn(model: NVAE, *, temperature: Temperature, iterations: int = 500, batch_size: int = 16, seed: int = 0) -> bool:
    """Move the BN running statistics of the decoder to those of samples at `temperature`; leaves the model in eval mode.

    `iterations` prior passes in training mode and at least in float32, each moving them by the momentum 0.05; the encoder's
    stay as they are. False: a pass made a statistic NaN or infinite, and all of them are what they were before.
    """
    generator = noise_generator(model.prior_ftr0.device, seed)
    statistics = _statistics(model)
    before = {name: value.clone() for name, value in statistics.items()}
    model.train()
    done = False
    try:
        with torch.autocast(model.prior_ftr0.device.type, enabled=False), shared_effective_weights(model.convolutions()):
            for i in range(iterations):
                model.sample(batch_size, temperature, generator=generator)
                last = i == iterations - 1
                # what became NaN stays NaN: looking now and then is enough
                if (last or i % 50 == 49) and not _finite(statistics):
                    break
                done = last
    finally:
        model.eval()
        if not done:
            _restore(statistics, before)
    return done


@torch.no_grad()
def readjust_bn_cached(model: NVAE, checkpoint: str | Path, *, temperature: Temperature, iterations: int = 500,
                       batch_size: int = 16, seed: int = 0) -> str:  # fmt: skip
    """`readjust_bn`, with the statistics kept in a safetensors file beside the checkpoint; says in a line what was done.

    The file, `bn-t<temperature>.safetensors`, is used as long as weights, settings and kind of device are those it was made
    with, and made anew otherwise. A place that cannot be written to only costs the time.
    """
    uniform = isinstance(temperature, (int, float))
    shown = f"{temperature:g}" if uniform else ",".join(f"{t:g}" for t in temperature)
    short = shown if uniform else hashlib.sha256(shown.encode()).hexdigest()[:12]
    path = Path(checkpoint)
    file = path / f"bn-t{short}.safetensors" if path.is_dir() else path.with_name(f"{path.stem}.bn-t{short}.safetensors")
    made_with = {"temperature": shown, "iterations": str(iterations), "batch_size": str(batch_size), "seed": str(seed),
                 "device": model.prior_ftr0.device.type, "weights": fingerprint(model)}  # fmt: skip
    statistics = _statistics(model)
    kept = _read(file, made_with)
    if kept is not None and all(n in kept and kept[n].shape == s.shape for n, s in statistics.items()) and _finite(kept):
        _restore(statistics, kept)
        model.eval()
        return f"BN statistics for temperature {shown} from {file}"
    if not readjust_bn(model, temperature=temperature, iterations=iterations, batch_size=batch_size, seed=seed):
        return f"BN re-adjustment at temperature {shown} made statistics NaN or infinite: the original ones are used instead"
    content = save({n: s.cpu().contiguous() for n, s in statistics.items()}, made_with)
    try:
        atomic_write(file, lambda out: out.write(content))
    except InputError as error:
        return f"BN statistics re-adjusted to temperature {shown}, and not kept: {error}"
    return f"BN statistics re-adjusted to temperature {shown} in {iterations} passes, kept in {file}"


def fingerprint(model: NVAE) -> str:
    """SHA-256 (hex) of the names, types and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _statistics(model: NVAE) -> dict[str, Tensor]:
    parts = ("running_mean", "running_var", "num_batches_tracked")
    names = {module: name for name, module in model.named_modules()}
    return {f"{names[bn]}.{part}": getattr(bn, part) for bn in model.batch_norms() for part in parts}


def _finite(statistics: Mapping[str, Tensor]) -> bool:
    """No NaN, no infinity, no negative variance. The sum of finite float32 numbers is finite in float64."""
    total = sum(s.double().sum() for s in statistics.values())
    negative = sum((s < 0).any() for n, s in statistics.items() if n.endswith("running_var"))
    return bool(torch.isfinite(torch.as_tensor(total))) and not bool(negative)


def _restore(statistics: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in statistics.items():
        value.copy_(values[name])


def _read(file: Path, made_with: Mapping[str, str]) -> dict[str, Tensor] | None:
    try:
        with safe_open(file, framework="pt") as stored:
            if stored.metadata() != made_with:
                return None
            return {name: stored.get_tensor(name) for name in stored.keys()}
    except (OSError, SafetensorError):  # not there, or damaged: it is made anew
        return None
