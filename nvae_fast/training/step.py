"""One optimiser step as one call that never waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nvae_fast.errors import InputError
from nvae_fast.model import NVAE
from nvae_fast.optim import FusedAdamax
from nvae_fast.regularization import SpectralState

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BATCH = "recon", "kl", "kl_all"  # terms with an axis of images, the last one


class TrainingStep:
    """`step(x, rate=..., kl_coeff=..., norm_coeff=...)`: forward, loss with its regularisers, backward, Adamax.

    Args:
        model, optimizer, spectral: what it trains, and the singular vectors that it moves along.
        precision: "fp32", or the type that autocast stores activations in: "bf16", "fp16".
        loss: `loss(x, kl_coeff=, spectral_coeff=, spectral=)` -> terms by name, of the same model; None: `model.loss`.
        max_grad_norm: gradients whose common norm is larger are scaled down to it, regularisers included.
        accumulate: parts that a batch is cut into, one forward and backward each; the regularisers enter once.
        graph: replay the step as one CUDA graph where that is possible.

    A call returns these terms, detached, on the model's device: the scalars `total`, `spectral`, `bn`, `grad_norm` (of all
    gradients together, before clipping) and `skipped` (0 or 1), `recon` and `kl` [B], `kl_all` [N, B]. Nothing is read from the
    device: whoever needs a number calls `.item()`, now or some steps later. `skipped` and `skipped_in_a_row` of the step count the
    steps that were not taken.
    """

    def __init__(
        self,
        model: NVAE,
        optimizer: FusedAdamax,
        spectral: SpectralState,
        *,
        precision: str = "fp32",
        loss: Callable[..., dict[str, Tensor]] | None = None,
        max_grad_norm: float | None = None,
        accumulate: int = 1,
        graph: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise InputError(f"precision '{precision}': expected one of {', '.join(PRECISIONS)}")
        self.model, self.optimizer, self.spectral, self.precision = model, optimizer, spectral, precision
        self.loss = model.loss if loss is None else loss
        self.max_grad_norm, self.accumulate, self.graph = max_grad_norm, accumulate, graph
        device = next(model.parameters()).device
        self.skipped, self.skipped_in_a_row = torch.zeros(2, dtype=torch.int64, device=device).unbind()

    def __call__(self, x: Tensor, *, rate: float, kl_coeff: float, norm_coeff: float) -> dict[str, Tensor]:
        """One step on the batch x [B, C, H, W] with the learning rate, KL weight and weight of the regularisers given."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(x, kl_coeff, norm_coeff)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if self.accumulate > 1:
            torch._foreach_div_(grads, self.accumulate)
        norm = torch.nn.utils.get_total_norm(grads)
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        self.optimizer.step()
        return terms | {"grad_norm": norm, "skipped": torch.zeros_like(self.skipped)}

    def _backward(self, x: Tensor, kl_coeff: float, norm_coeff: float) -> dict[str, Tensor]:
        """Sums the gradients of all parts; the terms of the whole batch."""
        parts = x.chunk(self.accumulate)
        found = []
        for i, part in enumerate(parts):
            # Once: with the last part, as many times as the mean will divide it by.
            weight = norm_coeff * self.accumulate if i == len(parts) - 1 else 0.0
            with torch.autocast(x.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"):
                terms = self.loss(part, kl_coeff=kl_coeff, spectral_coeff=weight, spectral=self.spectral)
            terms["total"].backward()
            found.append({name: t.detach() for name, t in terms.items()})
        last = found[-1]
        joined = {name: torch.cat([f[name] for f in found], -1) for name in BATCH} if len(found) > 1 else last
        total = torch.stack([f["total"] for f in found]).mean() if len(found) > 1 else last["total"]
        return {"total": total, "spectral": last["spectral"], "bn": last["bn"]} | {name: joined[name] for name in BATCH}
