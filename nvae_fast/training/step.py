"""One optimiser step as one call that never waits for the device."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from nvae_fast.errors import InputError
from nvae_fast.model import NVAE
from nvae_fast.optim import FusedAdamax
from nvae_fast.regularization import SpectralState
from nvae_fast.training.graph import StepGraph, graph_obstacle
from nvae_fast.training.packed import Packed

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = "recon", "kl", "kl_all"  # terms with an axis of images, the last one
FIRST_SCALE, GROWTH_INTERVAL = 2.0**10, 2000
"""Of the loss in fp16, as published; torch.amp.GradScaler's rule: half after a skipped step, twice after so many others."""

Number = float | Tensor
Terms = dict[str, Tensor]


class TrainingStep:
    """`step(x, rate=..., kl_coeff=..., norm_coeff=...)`: forward, loss with its regularisers, backward, Adamax.

    Args:
        model, optimizer, spectral: what it trains, and the singular vectors that it moves along.
        precision: "fp32", or the type that autocast stores activations in: "bf16", "fp16" (with a loss scale).
        loss: `loss(x, kl_coeff=, spectral_coeff=, spectral=)` -> terms by name, of the same model; None: `model.loss`.
        max_grad_norm: gradients whose common norm is larger are scaled down to it, those of the regularisers included, before
            weight decay. As torch.nn.utils.clip_grad_norm_.
        accumulate: parts that a batch is cut into, one forward and backward each; the step takes the mean of their gradients,
            and the regularisers once. Each part has batch norm statistics and a KL balance of its own.
        graph: replay the step as one CUDA graph where that is possible; one line on stderr says where not.

    A call returns these terms, detached, on the model's device: the scalars `total`, `spectral`, `bn`, `grad_norm` (of all
    gradients together, before clipping) and `skipped` (0 or 1), `recon` and `kl` [B], `kl_all` [N, B]. Nothing is read from the
    device: whoever needs a number calls `.item()`, now or some steps later.

    A step whose loss or any gradient is not finite, on any process, is skipped on all: parameters, their state and average, u
    and v and the statistics of batch norms stay as they were, bit for bit. (Only the long first power iteration of a run
    stands.) The tensors `skipped` and `skipped_in_a_row` count such steps.
    """

    def __init__(
        self,
        model: NVAE,
        optimizer: FusedAdamax,
        spectral: SpectralState,
        *,
        precision: str = "fp32",
        loss: Callable[..., Terms] | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        graph: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision '{precision}': expected one of {', '.join(PRECISIONS)}")
        if accumulate < 1:
            raise InputError(f"accumulate {accumulate}: expected 1 or more parts of a batch")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InputError(f"max_grad_norm {max_grad_norm}: expected a number above 0, or none at all")
        self.model, self.optimizer, self.spectral, self.precision = model, optimizer, spectral, precision
        self.loss = model.loss if loss is None else loss
        self.max_grad_norm, self.accumulate = max_grad_norm, accumulate
        device = next(model.parameters()).device
        self.skipped, self.skipped_in_a_row, self._grown = torch.zeros(3, dtype=torch.int64, device=device).unbind()
        self.scale = torch.tensor(FIRST_SCALE, device=device) if precision == "fp16" else None
        norms = [m for m in model.modules() if isinstance(m, _NormBase)]
        self._statistics = Packed(lambda: [b for m in norms for b in m._buffers.values() if b is not None])
        self._graph = None
        if graph:
            obstacle = graph_obstacle(device)
            if obstacle is None:
                self._graph = StepGraph(self._run, device, lambda: optimizer.packed() and self._statistics.intact())
            else:
                print(f"nvae-fast: the step runs without a CUDA graph: {obstacle}", file=sys.stderr)

    def __call__(self, x: Tensor, *, rate: Number, kl_coeff: Number, norm_coeff: Number) -> Terms:
        """One step on the batch x [B, C, H, W] with the learning rate, KL weight and weight of the regularisers given."""
        if len(x) % self.accumulate:
            raise InputError(f"accumulate {self.accumulate}: a batch of {len(x)} has no {self.accumulate} equal parts")
        run = self._run if self._graph is None else self._graph
        terms = run(x, rate, kl_coeff, norm_coeff)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return terms

    @property
    def recorded(self) -> bool:
        """Whether the next step is a replay of a CUDA graph."""
        return self._graph is not None and self._graph.ready

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs to go on: the counts of skipped steps and, in fp16, the loss scale and its age."""
        state = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return state if self.scale is None else state | {"scale": self.scale, "grown": self._grown}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned, in this or another precision."""
        for name, own in self.state_dict().items():
            if name in state:
                own.copy_(state[name])

    def _run(self, x: Tensor, rate: Number, kl_coeff: Number, norm_coeff: Number) -> Terms:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        kept = self._keep()
        terms = self._backward(x, kl_coeff, norm_coeff)
        found: Terms = {}

        def decide(squares: Tensor) -> tuple[Tensor | None, Tensor]:
            both = squares + terms["total"].detach()
            take = both - both == 0  # both are finite
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                votes = take.float()
                dist.all_reduce(votes, dist.ReduceOp.MIN)
                take = votes > 0
            norm, factor = squares.sqrt(), None
            if self.accumulate > 1 or self.scale is not None:
                factor = torch.full_like(norm, 1 / self.accumulate) / (1.0 if self.scale is None else self.scale)
                norm = norm * factor
            if self.max_grad_norm is not None:
                clip = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                factor = clip if factor is None else factor * clip
            found.update(take=take, grad_norm=norm.float())
            return None if factor is None else factor.float(), take

        self.optimizer.step(decide=decide)
        take = found["take"]
        self._restore(kept, take)
        skipped = (~take).long()
        self.skipped += skipped
        self.skipped_in_a_row += 1
        self.skipped_in_a_row *= skipped
        if self.scale is not None:
            self._grown += 1
            self._grown *= 1 - skipped
            grow = self._grown == GROWTH_INTERVAL
            self.scale *= 1 + grow.float() - 0.5 * skipped  # no torch.where of numbers: it copies them to the device
            self._grown *= ~grow
        return terms | {"grad_norm": found["grad_norm"], "skipped": skipped}

    def _backward(self, x: Tensor, kl_coeff: Number, norm_coeff: Number) -> Terms:
        """Sums the gradients of all parts; the terms of the whole batch."""
        parts = x.chunk(self.accumulate)
        no_sync = getattr(self.loss, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
        found = []
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # The regularisers enter with the last part, as many times as the mean will divide them by.
            weight = norm_coeff * self.accumulate if last else 0.0
            with contextlib.nullcontext() if last else no_sync():
                with torch.autocast(x.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
                    terms = self.loss(part, kl_coeff=kl_coeff, spectral_coeff=weight, spectral=self.spectral)
                total = terms["total"]
                (total if self.scale is None else total * self.scale).backward()
            found.append({name: terms[name].detach() for name in ("total", "spectral", "bn", *BATCH)})
        if len(found) > 1:
            joined = {name: torch.cat([f[name] for f in found], -1) for name in BATCH}
            found[-1] |= joined | {"total": torch.stack([f["total"] for f in found]).mean()}
        return found[-1]

    def _keep(self) -> list[tuple[list[Tensor], Tensor]]:
        """What a forward pass changes, in one copy for each type of number."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for t in (*self._statistics.buffers(), *(self.spectral.state_dict().values() if self.spectral.warm else ())):
            kinds.setdefault(t.dtype, []).append(t)
        return [(same, torch.cat([t.flatten() for t in same])) for same in kinds.values()]

    def _restore(self, kept: list[tuple[list[Tensor], Tensor]], take: Tensor) -> None:
        if take.device.type == "cpu" and take.numpy():  # nothing to wait for
            return
        for tensors, old in kept:
            new = torch.where(take, torch.cat([t.flatten() for t in tensors]), old)
            pieces = new.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(pieces, tensors, strict=True)])
