"""What a benchmark has to know of each op: inputs from a seed, our call, and the plain PyTorch that it competes with.

The plain side is what a good engineer writes with torch alone; it never goes through `nvae_fast.functional`. Where that is the
formula itself, step by step, it is the op's own `reference.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as tf
from torch import Generator, Tensor

from nvae_fast import functional as F
from nvae_fast.kernels.flow_cell.reference import autoregressive_mask
from nvae_fast.kernels.logistic_mixture import reference as logistic_mixture
from nvae_fast.kernels.residual_normal import reference as residual_normal

Tensors = Sequence[Tensor]

MIXTURES = 10


class Inputs(NamedTuple):
    """`leaves` are differentiated, `data` is not."""

    leaves: list[Tensor]
    data: list[Tensor]


def size(tensors: Tensors) -> int:
    """Bytes of all of them."""
    return sum(t.numel() * t.element_size() for t in tensors)


class Recipe(ABC):
    """One op; all functions of a recipe get the same `Inputs`."""

    parts: tuple[str, ...] = ()  # the ops whose implementations count, where the recipe is not an op itself

    @abstractmethod
    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs: ...

    @abstractmethod
    def ours(self, impl: str, inputs: Inputs) -> Tensors: ...

    @abstractmethod
    def plain(self, inputs: Inputs) -> Tensors: ...

    def rivals(self, device: torch.device) -> dict[str, Callable[[Inputs], Tensors]]:
        """Further forms that compete, by name, there, on channels-last inputs."""
        return {}

    def given(self, inputs: Inputs) -> list[Tensor]:
        """The tensors that decide which implementations can run, in the order of the op's arguments."""
        if self.parts:
            return inputs.leaves[:1]
        return [t for t in (*inputs.leaves, *inputs.data) if t.is_floating_point()]

    def traffic(self, inputs: Inputs, outputs: Tensors) -> tuple[int, int] | None:
        """Algorithmic bytes of forward and backward; here of an op that reads or writes everything once: inputs read, outputs
        written; inputs and the outputs' gradients read, the leaves' written."""
        everything = size(inputs.leaves) + size(inputs.data) + size(outputs)
        return everything, everything + size(inputs.leaves)


def normal(generator: Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=generator)


def filters(generator: Generator, *shape: int) -> Tensor:
    """[O, I, k, k] that keep the variance."""
    return normal(generator, *shape, scale=(shape[1] * shape[2] * shape[3]) ** -0.5)


class BnAct(Recipe):
    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        c = shape[1]
        leaves = [normal(g, *shape).to(dtype), 1 + normal(g, c, scale=0.1), normal(g, c, scale=0.1)]
        return Inputs(leaves, [torch.zeros(c), torch.ones(c)])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.bn_act(*inputs.leaves, *inputs.data, training=True, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        x, weight, bias = inputs.leaves
        return [tf.silu(tf.batch_norm(x, *inputs.data, weight, bias, training=True, momentum=0.05))]

    def traffic(self, inputs: Inputs, outputs: Tensors) -> tuple[int, int]:
        """Statistics come before use: x is read twice, in the backward the gradient too."""
        forward, backward = super().traffic(inputs, outputs)
        return forward + size(inputs.leaves[:1]), backward + size(inputs.leaves[:1]) + size(outputs)


class DepthwiseConv(Recipe):
    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        return Inputs([normal(g, *shape).to(dtype), filters(g, shape[1], 1, 5, 5).to(dtype)], [])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.depthwise_conv(*inputs.leaves, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        x, weight = inputs.leaves
        return [tf.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])]


class PointwiseConv(Recipe):
    """From C to 6 C channels."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        return Inputs([normal(g, *shape).to(dtype), filters(g, 6 * shape[1], shape[1], 1, 1).to(dtype)], [])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.pointwise_conv(*inputs.leaves, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        return [tf.conv2d(*inputs.leaves)]


class NormSwishDepthwise(Recipe):
    """BN, Swish and a depthwise 5 x 5 convolution."""

    parts = ("depthwise_conv",)

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        c = shape[1]
        leaves = [
            normal(g, *shape).to(dtype),
            filters(g, c, 1, 5, 5).to(dtype),
            *(1 + normal(g, c, scale=0.1) for _ in range(2)),
        ]
        return Inputs(leaves, [torch.zeros(c), torch.ones(c)])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        x, weight, *affine = inputs.leaves
        return [F.depthwise_conv(x, weight, norm=F.Norm(*affine, *inputs.data), act="swish", impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        x, weight, gamma, beta = inputs.leaves
        u = tf.silu(tf.batch_norm(x, *inputs.data, gamma, beta, True, 0.05, 1e-5))
        return [tf.conv2d(u, weight, padding=weight.shape[-1] // 2, groups=x.shape[1])]


class ResidualNormal(Recipe):
    """The noise is data."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        return Inputs([normal(g, *shape).to(dtype) for _ in range(4)], [normal(g, *shape)])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return list(F.residual_normal(*inputs.leaves, *inputs.data, impl=impl))

    def plain(self, inputs: Inputs) -> Tensors:
        return list(residual_normal.residual_normal(*inputs.leaves, *inputs.data, residual=True))


class LogisticMixture(Recipe):
    """The shape is that of params."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        levels = torch.randint(256, (shape[0], 3, *shape[2:]), generator=g)
        return Inputs([normal(g, *shape).to(dtype)], [levels / 255])

    def given(self, inputs: Inputs) -> list[Tensor]:
        return [*inputs.data, *inputs.leaves]

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.logistic_mixture_log_prob(*inputs.data, *inputs.leaves, num_mixtures=MIXTURES, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        return [logistic_mixture.logistic_mixture_log_prob(*inputs.data, *inputs.leaves, num_mixtures=MIXTURES)]


def causal_mask(w: Tensor) -> Tensor:
    groups = w.shape[0] if w.shape[1] == 1 else 1
    return autoregressive_mask(w.shape[0], w.shape[1] * groups, w.shape[2], groups, strict=w.shape[2] == 3, mirror=False)


class FlowCell(Recipe):
    """Its weights are effective ones."""

    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        c, hidden = shape[1], 6 * shape[1]
        weights = [filters(g, *s) for s in ((hidden, c, 3, 3), (hidden, 1, 5, 5), (c, hidden, 1, 1))]
        leaves = [normal(g, *shape), *(w * causal_mask(w) for w in weights), normal(g, c, scale=0.1)]
        return Inputs([t.to(dtype) for t in leaves], [])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.flow_cell(*inputs.leaves, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        z, w_in, w_dw, w_out, bias = inputs.leaves
        hidden = tf.elu(tf.conv2d(z, w_in, padding=1))
        hidden = tf.elu(tf.elu(tf.conv2d(hidden, w_dw, padding=2, groups=hidden.shape[1])))
        return [z - tf.conv2d(hidden, w_out, bias)]


class SeResidual(Recipe):
    def make(self, shape: Sequence[int], dtype: torch.dtype, g: Generator) -> Inputs:
        c, hidden = shape[1], max(shape[1] // 16, 4)
        linear = [(hidden, c), (hidden,), (c, hidden), (c,)]
        leaves = [normal(g, *shape), normal(g, *shape), *(normal(g, *s, scale=c**-0.5) for s in linear)]
        return Inputs([t.to(dtype) for t in leaves], [])

    def ours(self, impl: str, inputs: Inputs) -> Tensors:
        return [F.se_residual(*inputs.leaves, impl=impl)]

    def plain(self, inputs: Inputs) -> Tensors:
        skip, x, w1, b1, w2, b2 = inputs.leaves
        gate = torch.sigmoid(tf.linear(tf.relu(tf.linear(x.mean((2, 3)), w1, b1)), w2, b2))
        return [skip + 0.1 * (x * gate[:, :, None, None])]


OPS: dict[str, Recipe] = {
    "bn_act": BnAct(),
    "depthwise_conv": DepthwiseConv(),
    "bn_swish_depthwise": NormSwishDepthwise(),
    "pointwise_conv": PointwiseConv(),
    "residual_normal": ResidualNormal(),
    "logistic_mixture_log_prob": LogisticMixture(),
    "flow_cell": FlowCell(),
    "se_residual": SeResidual(),
}
