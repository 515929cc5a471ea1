"""The loss of a model whose gradients are averaged over processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nvae_fast.model import NVAE
from nvae_fast.training.distributed import Processes


class Loss(nn.Module):
    """`model.loss` as a forward pass, KL balancing over the joined batch of all processes (over each one's own with
    compat="nvlabs", as in the public code)."""

    def __init__(self, model: NVAE, processes: Processes) -> None:
        super().__init__()
        self.model = model
        self.reduce = None if model.config.compat == "nvlabs" else processes.mean

    def forward(self, x: Tensor, **settings: Any) -> dict[str, Tensor]:
        return self.model.loss(x, reduce=self.reduce, **settings)


def parallel_loss(model: NVAE, processes: Processes) -> Callable[..., dict[str, Tensor]] | None:
    """What TrainingStep takes as its loss: None with one process, else one whose backward averages the gradients, bucket by
    bucket while it runs: those of convolutions and of the scales of batch norms come in parts of about a bucket
    (`shared_effective_weights`), others one by one. Batch norms are joined and hence equal everywhere: their buffers need not
    travel."""
    if processes.size == 1:
        return None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before torch 2.13
    return DistributedDataParallel(
        Loss(model, processes), gradient_as_bucket_view=False, **{buffers: False},
        find_unused_parameters=model.config.vanilla,  # its learned prior features feed nothing
    )  # fmt: skip
