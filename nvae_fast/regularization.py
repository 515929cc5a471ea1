"""Spectral regularisation of all convolutions by power iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nvae_fast import functional as F
from nvae_fast.errors import InputError
from nvae_fast.kernels.shared_weights import SharedWeights
from nvae_fast.layers.conv import WeightNormConv2d

FIRST_ITERATIONS, ITERATIONS = 40, 4
Member = tuple[Tensor, "tuple[SharedWeights, int] | None"]


class SpectralState:
    """The singular vectors of every convolution, carried from step to step.

    Calling it with the convolutions returns the sum of sigma = u^T W v over their effective weights W, seen as matrices
    (Cout, rest), after 40 power iterations the first time a shape is seen and 4 later. u and v are constants for the gradient:
    d sigma / dW = u v^T. `u["RxC"]` is [n, R] and `v["RxC"]` [n, C] for the n matrices of that shape, in layer order; they stay
    where they are in memory while they move.
    """

    def __init__(self, seed: int = 0) -> None:
        self.u: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        self.seed = seed
        self._warm: set[str] = set()  # shapes that have had their long first run

    @property
    def warm(self) -> bool:
        """Whether every shape seen so far has had its long first run."""
        return bool(self.u) and self._warm >= self.u.keys()

    def __call__(self, convs: Sequence[nn.Conv2d]) -> Tensor:
        """The spectral regulariser (a scalar); moves u and v."""
        # Where weights are shared, their gradients take u v^T along on their way to the parameters.
        places = [getattr(conv, "joint", None) for conv in convs]
        zeros = {shared: shared.claim("spectral") for shared in dict.fromkeys(place[0] for place in places if place)}
        groups: dict[str, list[Member]] = {}
        for conv, place in zip(convs, places, strict=True):
            joined = place is not None and zeros[place[0]] is not None
            weight = place[0].matrix(place[1]) if joined else _own(conv)
            groups.setdefault(shape_key(weight), []).append((weight, place if joined else None))
        total = [zero for zero in zeros.values() if zero is not None]
        for iterations in (FIRST_ITERATIONS, ITERATIONS):
            keys = [k for k in groups if (k in self._warm) == (iterations == ITERATIONS)]
            total += self._advance({k: groups[k] for k in keys}, iterations)
        self._warm.update(groups)
        return torch.stack(total).sum()

    def _advance(self, groups: Mapping[str, list[Member]], iterations: int) -> list[Tensor]:
        for key, members in groups.items():
            self._ensure_vectors(key, [weight for weight, _ in members])
        members = [m for some in groups.values() for m in some]
        u, v = ([row for k in groups for row in store[k].unbind()] for store in (self.u, self.v))
        sums = []
        for joined in (True, False):
            which = [i for i, (_, place) in enumerate(members) if (place is not None) == joined]
            if which:
                weights = [members[i][0] for i in which]
                sigma, *new = F.power_iteration(weights, [u[i] for i in which], [v[i] for i in which], iterations=iterations)
                sums.append(sigma.sum())
                for i, vectors in zip(which, zip(*new, strict=True), strict=True):
                    u[i], v[i] = vectors
                    if joined:
                        shared, number = members[i][1]
                        shared.terms[number] = "spectral", *vectors
        if members:
            with torch.no_grad():  # shape by shape: a copy of each vector takes many launches
                kept = [[store[k] for k in groups] for store in (self.u, self.v)]
                pieces = [torch.cat(new).split([t.numel() for t in old]) for old, new in zip(kept, (u, v), strict=True)]
                kept, pieces = kept[0] + kept[1], pieces[0] + pieces[1]
                torch._foreach_copy_(kept, [p.view(t.shape) for p, t in zip(pieces, kept, strict=True)])
        return sums

    def _ensure_vectors(self, key: str, weights: list[Tensor]) -> None:
        if key not in self.u:  # seeded by shape, so that no other shape changes them
            rows, columns = map(int, key.split("x"))
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + rows * 65_537 + columns)
            for store, width in ((self.u, rows), (self.v, columns)):
                vectors = torch.randn(len(weights), width, generator=generator).to(weights[0].device)
                store[key] = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-3)
        elif self.u[key].shape[0] != len(weights):
            raise InputError(f"spectral state holds {self.u[key].shape[0]} matrices of {key}, the model has {len(weights)}")

    def state_dict(self) -> dict[str, Tensor]:
        """u and v by `u/RxC` and `v/RxC`."""
        return {f"{name}/{k}": t for name, store in (("u", self.u), ("v", self.v)) for k, t in store.items()}

    def load_state_dict(self, state: dict[str, Tensor], *, warm: bool = True) -> None:
        """Take over what `state_dict` returned; the next call iterates 4 times if `warm`, else 40 times."""
        for name, store in (("u", self.u), ("v", self.v)):
            given = {k.removeprefix(f"{name}/"): t for k, t in state.items() if k.startswith(f"{name}/")}
            for key in store.keys() - given.keys():
                del store[key]
            for key, t in given.items():
                old = store.get(key)
                if old is not None and (old.shape, old.dtype, old.device) == (t.shape, t.dtype, t.device):
                    old.copy_(t)  # a recorded step writes there
                else:
                    store[key] = t.clone()
        self._warm = set(self.u) if warm else set()


def _own(conv: nn.Conv2d) -> Tensor:
    """The weight that it convolves with, with its gradient, in the type of its parameter."""
    if not isinstance(conv, WeightNormConv2d):
        return conv.weight
    weight = conv.effective_weight()
    return weight if weight.dtype == conv.weight.dtype else conv.normalised()


def shape_key(weight: Tensor) -> str:
    """ "RxC" of a convolution weight seen as a matrix (Cout, rest)."""
    return f"{weight.shape[0]}x{weight.numel() // weight.shape[0]}"
