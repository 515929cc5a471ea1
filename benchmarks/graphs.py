"""Training steps replayed as one CUDA graph: ours as the trainer records it, the plain model's whole step with torch's
multi-tensor Adamax. Not yet run on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from nvae_fast.benchmarks.steps import KL_COEFF, SPECTRAL_COEFF, Step
from nvae_fast.benchmarks.timing import graphed
from nvae_fast.errors import RunError
from nvae_fast.graph import WARM_UP
from nvae_fast.training.step import PRECISIONS, TrainingStep


class Recorded(Step):
    """A copy of `step` as a graph. A call replays it, weights and singular vectors move on; the first one starts from those of
    `step`. RunError where it cannot be recorded."""

    def __init__(self, step: Step) -> None:
        super().__init__(
            copy.deepcopy(step.model), copy.deepcopy(step.spectral), step.x, step.noise, step.impl, step.dtype, step.config
        )
        before = [t.clone() for t in self._moving()]
        self._loss = self._trainers() if self.impl == "auto" else self._plain()
        for t, old in zip(self._moving(), before, strict=True):  # found anew: our optimiser moved the weights
            t.copy_(old)

    def _moving(self) -> list[Tensor]:
        weights = [p.detach() for p in self.model.parameters()]
        return [*weights, *self.spectral.u.values(), *self.spectral.v.values()]

    def make_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer()
        if self.impl != "auto":
            optimizer.param_groups[0]["capturable"] = self.x.is_cuda
        return optimizer

    def backward(self) -> Tensor:
        """A whole step; the gradients of the weights before it stay in their places."""
        return self._loss()

    def __call__(self) -> None:
        self._loss()

    def _trainers(self) -> Callable[[], Tensor]:
        precision = next(name for name, dtype in PRECISIONS.items() if dtype == self.dtype)
        step = TrainingStep(
            self.model, self.optimizer, self.spectral, precision=precision, loss=partial(self.model.loss, noise=self.noise),
            graph=True,
        )  # fmt: skip

        def loss() -> Tensor:
            rate = self.config.training.learning_rate
            return step(self.x, rate=rate, kl_coeff=KL_COEFF, norm_coeff=SPECTRAL_COEFF)["total"]

        for _ in range(WARM_UP + 1):
            loss()
        if not step.recorded:
            raise RunError("our step was not recorded")
        return loss

    def _plain(self) -> Callable[[], Tensor]:
        kept: list[Tensor] = []

        def call() -> None:
            kept[:] = [Step.backward(self)]
            self.optimizer.step()

        replay = graphed(call)
        if replay is call:
            raise RunError("the plain step was not recorded")

        def loss() -> Tensor:
            replay()
            return kept[0]

        return loss
