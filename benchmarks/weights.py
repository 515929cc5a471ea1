"""Recipes of the ops that work on all weights of a model at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as tf
from torch import Generator, Tensor

from nvae_fast import functional as F
from nvae_fast.benchmarks.ops import Inputs, Recipe, Tensors, causal_mask, filters, normal, size
from nvae_fast.kernels.power_iteration import reference as power_iteration

ITERATIONS = 4

CONVOLUTIONS = [  # of an NVAE with 64 and 128 channels: (how often of 100, shape), 17.5 MB in all
    (25, (384, 64, 1, 1)),
    (25, (384, 1, 5, 5)),
    (25, (64, 384, 1, 1)),
    (18, (128, 128, 3, 3)),
    (7, (64, 64, 3, 3)),
]


class PowerIteration(Recipe):
    """The shape is the number of matrices."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        weights = [filters(g, *s).to(dtype) for n, s in CONVOLUTIONS for _ in range(n * shape[0] // 100)]
        vectors = [normal(g, n) for w in weights for n in (w.shape[0], w[0].numel())]
        return Inputs(weights, [v / v.norm() for v in vectors])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        u, v = inputs.data[::2], inputs.data[1::2]
        sigma, u, v = F.power_iteration(inputs.leaves, u, v, iterations=ITERATIONS, impl=impl)
        return [sigma, *u, *v]

    def plain(self, inputs: Inputs) -> Tensors:
        sigma, u, v = power_iteration.power_iteration(inputs.leaves, inputs.data[::2], inputs.data[1::2], iterations=ITERATIONS)
        return [sigma, *u, *v]

    def rivals(self, device: torch.device) -> dict[str, Callable[[Inputs], Tensors]]:
        """One matrix after another, as the regulariser is usually written."""
        return {"eager_loop": self.loop}

    def loop(self, inputs: Inputs) -> Tensors:
        sigma, left, right = [], [], []
        for w, u, v in zip(inputs.leaves, inputs.data[::2], inputs.data[1::2], strict=True):
            matrix = w.reshape(w.shape[0], -1)
            with torch.no_grad():
                for _ in range(ITERATIONS):
                    v = tf.normalize(matrix.t() @ u, dim=0, eps=1e-3)
                    u = tf.normalize(matrix @ v, dim=0, eps=1e-3)
            sigma.append(torch.dot(u, matrix @ v))
            left.append(u)
            right.append(v)
        return [torch.stack(sigma), *left, *right]

    def traffic(self, inputs: Inputs, outputs: Tensors) -> tuple[int, int]:
        """Every matrix read once a round and once more; its gradient written."""
        return (ITERATIONS + 1) * size(inputs.leaves), size(inputs.leaves)


NORMALISED = [  # (how often of 53, shape, masked): towers, samplers, combiners, and the three of a flow cell
    (30, (64, 64, 3, 3), False),
    (10, (40, 64, 3, 3), False),
    (10, (64, 84, 1, 1), False),
    (1, (120, 20, 3, 3), True),
    (1, (120, 1, 5, 5), True),
    (1, (20, 120, 1, 1), True),
]


def _weight_norm_arguments(inputs: Inputs) -> tuple[Tensors, Tensors, list[Tensor | None]]:
    """weights, log norms and masks; the masked ones are the last."""
    n = len(inputs.leaves) // 2
    return inputs.leaves[:n], inputs.leaves[n:], [None] * (n - len(inputs.data)) + inputs.data


class WeightNorm(Recipe):
    """The shape is the number of convolutions."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        rows = [(s, masked) for n, s, masked in NORMALISED for _ in range(n)][-shape[0] :]
        weights = [filters(g, *s) for s, _ in rows]
        logs = [normal(g, s[0], 1, 1, 1, scale=0.1) for s, _ in rows]
        masks = [causal_mask(w) for w, (_, masked) in zip(weights, rows, strict=True) if masked]
        return Inputs([t.to(dtype) for t in (*weights, *logs)], masks)

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return F.weight_norm(*_weight_norm_arguments(inputs), impl=impl)

    def plain(self, inputs: Inputs) -> Tensors:
        out = []
        for w, log_norm, mask in zip(*_weight_norm_arguments(inputs), strict=True):
            if mask is not None:
                w = w * mask
            out.append(w * (log_norm.exp() / (torch.linalg.vector_norm(w, dim=(1, 2, 3), keepdim=True) + 1e-5)))
        return out


WEIGHTS: dict[str, Recipe] = {"power_iteration": PowerIteration(), "weight_norm": WeightNorm()}
