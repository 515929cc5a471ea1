"""What images are compared on: features by name, and the set of reference features of a data set."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nvae_fast.checkpoint.files import atomic_write, check_keys
from nvae_fast.checkpoint.native import read_tensors
from nvae_fast.checkpoint.nvlabs import read_nvlabs_file
from nvae_fast.data import ImageSource, make_loader, rng
from nvae_fast.errors import InputError, unknown
from nvae_fast.evaluation import ranks
from nvae_fast.metrics import KEEP, Moments, frechet_distance, kernel_distance
from nvae_fast.model import NVAE
from nvae_fast.sampling import Temperature, check_finite, sample_batches

BATCH, FORMAT = 64, "nvae_fast reference 1"  # images at a time; of the file of a reference
FID_WEIGHTS = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of pt_inception-2015-12-05-6726825d.pth (pytorch-fid; torch-fidelity ships the same file under weights-...)."""


class Features(NamedTuple):
    """`compute` takes images [B, C, H, W] in [0, 1] to features [B, dim]. `fid`: they are those that FID is defined on."""

    name: str
    dim: int
    compute: Callable[[Tensor], Tensor]
    fid: bool = False

    def label(self, kind: str) -> str:
        """The name of a distance on these features, kind "fd" or "kd": FID and KID are said of the FID network's only."""
        return {"fd": "FID", "kd": "KID"}[kind] if self.fid else f"{kind.upper()}-{self.name}"


def pixels(channels: int, device: torch.device) -> Features:
    """Means over an 8x8 grid of the image, by channel."""
    return Features("pixels8x8", channels * 64, lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1))


def randconv(channels: int, device: torch.device) -> Features:
    """A fixed random network: three times 3x3 convolution (stride 2, 32, 64, 128 channels) and ReLU, of which the mean and the
    standard deviation over space of every channel are the features. Weights are uniform with variance 2 / fan-in, by
    SplitMix64, the same everywhere. It sees texture and edges that `pixels` does not; it was never trained."""
    weights, width = [], channels
    for i, out in enumerate((32, 64, 128)):
        bound = math.sqrt(6 / (9 * width))
        u = rng.uniform(rng.keys(2007_03898, i, 0, np.arange(out)), 9 * width)
        weights.append(torch.from_numpy((2 * u - 1) * np.float32(bound)).view(out, width, 3, 3).to(device))
        width = out

    def compute(x: Tensor) -> Tensor:
        h, out = 2 * x - 1, []
        for w in weights:
            h = F.relu(F.conv2d(h, w, stride=2, padding=1))
            out += [h.mean((2, 3)), h.var((2, 3), correction=0).clamp_min(0).sqrt()]
        return torch.cat(out, 1)

    return Features("randconv", 2 * (32 + 64 + 128), compute)


def inception(path: str | Path, channels: int, device: torch.device) -> Features:
    """The 2048 pooled features of InceptionV3 with the weights in a file, a state dict (.pth, .pt) or safetensors; never code.

    They are called FID features if the file is FID's, by its SHA-256; with any other weights that fit they are named after
    that hash. Grey images are shown to the network in three equal channels.
    """
    if channels not in (1, 3):
        raise InputError(
            f"images of {channels} channels: the Inception network takes 1 or 3; use --features randconv or pixels"
        )
    path = Path(path)
    if path.suffix != ".safetensors" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                raise InputError(f"'{path}' is a TorchScript program, which is not run: give the network's state dict")
    given = read_tensors(path) if path.suffix == ".safetensors" else read_nvlabs_file(path)["state_dict"]
    from nvae_fast.inception import Inception

    with torch.device("meta"):
        model: nn.Module = Inception()
    wanted = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in given.items() if k in wanted}
    check_keys(wanted, given, what=f"'{path}' holds no weights of the Inception network", cure=_INCEPTION)
    model.load_state_dict({k: v.float() for k, v in given.items()}, strict=False, assign=True)
    model = model.requires_grad_(False).eval()
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        bn.num_batches_tracked = None
    model = model.to(device)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    fid = digest == FID_WEIGHTS
    return Features("inception" if fid else f"inception-{digest[:8]}", 2048, lambda x: model(x.expand(-1, 3, -1, -1)), fid)


BUILT_IN = {"pixels": pixels, "randconv": randconv}
_INCEPTION = "give --inception-weights FILE (pt_inception-2015-12-05-6726825d.pth for FID; nothing is downloaded)"


def check_features(name: str, weights: str | Path | None = None) -> None:
    """InputError for a name, or a file of weights, that `make_features` cannot take."""
    if name not in (*BUILT_IN, "inception"):
        raise unknown("features", name, [*BUILT_IN, "inception"])
    if name == "inception" and weights is None:
        raise InputError(f"the Inception network has no weights here: {_INCEPTION}")
    if weights is not None and not Path(weights).is_file():
        what = "is a folder" if Path(weights).is_dir() else "does not exist"
        raise InputError(f"the file of Inception weights '{weights}' {what}: {_INCEPTION}")


def make_features(name: str, channels: int, device: torch.device, weights: str | Path | None = None) -> Features:
    """The features of that name: a row of BUILT_IN, or "inception", which takes a file of `weights`."""
    check_features(name, weights)
    return BUILT_IN[name](channels, device) if name in BUILT_IN else inception(weights, channels, device)


class Collected(NamedTuple):
    """Features of a set of images: their number, mean [D] and covariance [D, D] in float64, and the first `KEEP` themselves."""

    count: int
    mean: np.ndarray
    cov: np.ndarray
    features: Tensor


@torch.no_grad()
def collect(batches: Iterable[Tensor], features: Features, device: torch.device, *, over_ranks: bool) -> Collected:
    """Features of images [B, C, H, W] in [0, 1], rounded to 8 bits as saved images are. With `over_ranks` the count and the
    moments are those of all ranks' images together; `Collected.features` are this rank's in any case."""
    moments, kept, room = Moments(features.dim), [torch.zeros(0, features.dim)], KEEP
    for x in batches:
        levels = (x.to(device).clamp(0, 1) * 255).round() / 255
        values = features.compute(levels).float()
        moments.add(values)
        kept.append(values[:room].cpu())
        room -= len(kept[-1])
    joined = moments.over_ranks(device) if over_ranks else moments
    return Collected(*joined.result(), torch.cat(kept))


def reference(source: ImageSource, features: Features, folder: str | Path, device: torch.device, *,
              limit: int = KEEP) -> Collected:  # fmt: skip
    """The features of the images of `source`, as they are: not binarised, flipped or padded. Of more than `limit` images a
    part of that size, always the same one, drawn as an epoch of training draws its batches.

    Kept in `folder` as reference-<features>-<hash>.safetensors, the hash being that of the images' number, first and last
    batch and of the features' name; a file that is there is used. A folder that cannot be written to only costs the time.
    """
    part, size = len(source) > limit, min(BATCH, limit)
    loader = make_loader(source, size, train=part, seed=0)
    count = min(limit, len(loader) * size) if part else len(source)

    def batches(first: int = 0) -> Iterator[Tensor]:
        loader.set_epoch(0, start_batch=first)
        left = count - first * size
        for x in loader:
            if left <= 0:
                return
            yield x[:left]
            left -= len(x)

    digest = hashlib.sha256(f"{features.name} {len(source)} {count}".encode())
    for first in (0, (count - 1) // size):
        x = next(batches(first), torch.zeros(0))
        digest.update(f"{tuple(x.shape)}".encode() + x.numpy().tobytes())
    file = Path(folder) / f"reference-{features.name}-{digest.hexdigest()[:16]}.safetensors"
    if (kept := _read(file, features.dim)) is not None:
        return kept
    out = collect(batches(), features, device, over_ranks=False)
    tensors = {"mean": torch.from_numpy(out.mean), "cov": torch.from_numpy(out.cov), "features": out.features}
    about = {"format": FORMAT, "images": source.name, "count": str(out.count)}
    try:
        atomic_write(file, lambda stream: stream.write(save(tensors, about)))
    except InputError:
        pass
    return out


def _read(file: Path, dim: int) -> Collected | None:
    try:
        with safe_open(file, framework="pt") as stored:
            about = stored.metadata() or {}
            if about.get("format") != FORMAT or not about.get("count", "").isdecimal():
                return None
            mean, cov, features = (stored.get_tensor(name) for name in ("mean", "cov", "features"))
    except (OSError, SafetensorError):  # not there, or damaged: it is made anew
        return None
    if mean.shape != (dim,) or cov.shape != (dim, dim) or features.dim() != 2 or features.shape[1] != dim:
        return None
    return Collected(int(about["count"]), mean.double().numpy(), cov.double().numpy(), features)


class Distance(NamedTuple):
    """A distance between samples of a model and reference images, with what it was measured on."""

    value: float
    standard_error: float | None  # of a kernel distance with two subsets or more
    samples: int
    reference_images: int


def score(model: NVAE, against: Collected, features: Features, kinds: Sequence[str], *, num_samples: int,
          temperature: Temperature = 1.0, batch_size: int = 100, seed: int = 0, mean: bool = True,
          progress: Callable[[int], None] | None = None) -> dict[str, Distance]:  # fmt: skip
    """Distances of `kinds` ("fd", "kd") by label between samples of the model at `temperature` and a reference.

    Samples are drawn as `sampling.sample_batches` does, with pixel means (as published FIDs of NVAE have them) unless `mean` is
    False, without the padding. Under torch.distributed every rank calls this and draws its share; all get the result.
    `progress` is called with the number of images of this rank's latest batch.
    """
    device, padding = model.prior_ftr0.device, model.config.padding
    part = ranks()

    def batches() -> Iterator[Tensor]:
        for x in sample_batches(model, num_samples, temperature=temperature, batch_size=batch_size, seed=seed, mean=mean,
                                part=part):  # fmt: skip
            yield check_finite(x[..., padding:-padding, padding:-padding] if padding else x)
            if progress is not None:
                progress(len(x))

    drawn = collect(batches(), features, device, over_ranks=True)
    out = {}
    for kind in kinds:
        if kind == "fd":
            value, error = frechet_distance(against.mean, against.cov, drawn.mean, drawn.cov), None
        elif kind == "kd":
            result = kernel_distance(drawn.features, against.features, device=device, part=part)
            value, error = result.value, result.standard_error if result.subsets > 1 else None
        else:
            raise unknown("distance", kind, ("fd", "kd"))
        out[features.label(kind)] = Distance(value, error, drawn.count, against.count)
    return out
