"""Distances between two sets of images, on features of them: Frechet distance and kernel distance."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvae_fast.data import rng
from nvae_fast.errors import InputError
from nvae_fast.evaluation import standard_error, sum_over_ranks

SUBSET, KEEP = 1000, 50_000  # features of a subset of the kernel distance; the most that a reference keeps for it
_SHUFFLE = 100  # a stream of random numbers of its own


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of two Gaussians, in float64 (Frechet 1957; Dowson & Landau 1982).

    means [D], covariances [D, D], symmetric and positive semidefinite, singular ones included. The trace of the root is the sum
    of the roots of the eigenvalues of the symmetric R S2 R with R = S1^(1/2), which has the eigenvalues of S1 S2: no complex
    numbers, and rounding gives at worst eigenvalues just below 0, which count as 0.

    Raises InputError for values that are not finite, or shapes that do not fit.
    """
    mean1, cov1, mean2, cov2 = (np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2))
    d = len(mean1)
    if mean2.shape != (d,) or cov1.shape != (d, d) or cov2.shape != (d, d):
        raise InputError(
            f"means of shapes {mean1.shape} and {mean2.shape}, covariances {cov1.shape} and {cov2.shape}: expected [D] and "
            "[D, D]; use the same features for both sets"
        )
    if not all(np.isfinite(a).all() for a in (mean1, cov1, mean2, cov2)):
        raise InputError("moments of features that are NaN or infinite: look at the images, or compute the reference anew")
    values, vectors = np.linalg.eigh((cov1 + cov1.T) / 2)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    inner = root @ cov2 @ root
    cross = np.sqrt(np.linalg.eigvalsh((inner + inner.T) / 2).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)


class Moments:
    """Mean and covariance (divisor n - 1) of features, added batch by batch in float64.

    Sums are taken about the first feature vector, so that they lose nothing to a large common mean.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.origin: Tensor | None = None
        self.total, self.products = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """features: [B, D], on any device."""
        if not len(features):
            return
        features = features.detach().double().cpu()
        if self.origin is None:
            self.origin = features[0].clone()
        centred = features - self.origin
        self.count += len(features)
        self.total += centred.sum(0)
        self.products += centred.T @ centred

    def over_ranks(self, device: torch.device) -> Moments:
        """Those of the features of all ranks: sums are joined, not covariances averaged. device: where ranks can reduce."""
        zero = torch.zeros_like(self.total)
        seen = torch.cat([zero if self.origin is None else self.origin, torch.tensor([float(self.origin is not None)])])
        seen = sum_over_ranks(seen.double().to(device)).cpu()
        out = Moments(len(zero))
        out.origin = seen[:-1] / seen[-1].clamp_min(1)
        shift = zero if self.origin is None else self.origin - out.origin  # sums about one origin become sums about another
        cross = torch.outer(self.total, shift)
        products = self.products + cross + cross.T + self.count * torch.outer(shift, shift)
        count = torch.tensor([float(self.count)], dtype=torch.float64)
        packed = sum_over_ranks(torch.cat([count, self.total + self.count * shift, products.flatten()]).to(device)).cpu()
        out.count, out.total = round(packed[0].item()), packed[1 : 1 + len(zero)]
        out.products = packed[1 + len(zero) :].view_as(products)
        return out

    def result(self) -> tuple[int, np.ndarray, np.ndarray]:
        """(n, mean [D], covariance [D, D]); InputError below two features."""
        if self.count < 2 or self.origin is None:
            raise InputError(f"{self.count} image(s): a covariance takes at least 2; ask for more --num-samples")
        mean = self.total / self.count
        cov = (self.products - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return self.count, (self.origin + mean).numpy(), cov.numpy()


class KernelDistance(NamedTuple):
    value: float
    standard_error: float  # NaN with one subset
    subsets: int
    subset_size: int


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased squared MMD of features x [m, D] and y [n, D] under k(a, b) = (a.b / D + 1)^3 (Binkowski et al. 2018):
    mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{ij} k(x_i, y_j), in float64."""
    x, y = x.double(), y.double()
    kernel = [(a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) for k in kernel[:2])
    return (within - 2 * kernel[2].mean()).item()


def kernel_distance(x: Tensor, y: Tensor, *, device: torch.device, subset_size: int = SUBSET, seed: int = 0,
                    part: tuple[int, int] = (0, 1)) -> KernelDistance:  # fmt: skip
    """The mean of `squared_mmd` over disjoint subsets of `subset_size` features of x [N, D] and y [M, D], and its standard
    error. Every subset is unbiased, and being disjoint they are independent, so that the error is honest.

    The features are shuffled by `seed` first. Under torch.distributed x holds this rank's features, y those of all, and `part`
    (rank, world size) picks this rank's share of y; the mean is over the subsets of all ranks.

    Raises InputError when there are not two features of each on some rank.
    """
    rank, world = part
    y = y[rank::world]
    size = min(subset_size, len(x), len(y))
    count = min(len(x), len(y)) // size if size else 0
    sums = torch.zeros(3, dtype=torch.float64)
    if size >= 2:
        x, y = (t[torch.from_numpy(rng.permutation(len(t), seed, i, _SHUFFLE)).to(t.device)] for i, t in enumerate((x, y)))
        for i in range(count):
            one = slice(i * size, (i + 1) * size)
            value = squared_mmd(x[one], y[one])
            sums += torch.tensor([1.0, value, value**2], dtype=torch.float64)
    n, total, squares = sum_over_ranks(sums.to(device)).tolist()
    if not n:
        raise InputError("a kernel distance takes at least 2 images of each set: ask for more --num-samples")
    return KernelDistance(total / n, standard_error(n, total, squares) if n > 1 else math.nan, round(n), size)
