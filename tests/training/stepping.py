"""A tiny model with all that a step moves."""

from __future__ import annotations

import torch

from nvae_fast import NVAE, NVAEConfig
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.training.step import TrainingStep

SIZES = {"num_latent_scales": 2, "num_latent_per_group": 2, "num_channels_enc": 4, "num_channels_dec": 4}
CELLS = {f"num_{k}": 1 for k in ("groups_per_scale", "preprocess_blocks", "postprocess_blocks", "preprocess_cells",
                                 "postprocess_cells", "cell_per_cond_enc", "cell_per_cond_dec")}  # fmt: skip
NUMBERS = {"rate": 0.01, "kl_coeff": 0.5, "norm_coeff": 0.01}
OPTIONS = {}, {"max_grad_norm": 1.0, "accumulate": 2}, {"precision": "fp16"}
EVENTS = torch.nan, torch.inf, -torch.inf


class Run:
    """A tiny model with all that a step moves."""

    def __init__(self, ema_decay=None, **options):
        torch.manual_seed(0)
        self.model = NVAE(NVAEConfig(image_size=(16, 16), channels=1, likelihood="bernoulli", use_se=True, res_dist=True,
                                     **SIZES, **CELLS))  # fmt: skip
        self.model.to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.model, ema_decay=ema_decay)
        self.spectral = SpectralState()
        self.step = TrainingStep(self.model, self.optimizer, self.spectral, **options)

    def __call__(self, count=1, seed=1, **options):
        torch.manual_seed(seed)
        for _ in range(count):
            terms = self.step(batch(), **NUMBERS | options)
        return terms

    def everything(self):
        """All that a skipped step must leave alone, as bytes by name."""
        state = self.optimizer.state_dict()["state"]
        found = (
            {f"{i}/{k}": t for i, s in state.items() for k, t in s.items()}
            | self.model.state_dict()
            | self.spectral.state_dict()
        )
        return {name: t.detach().contiguous().view(-1).numpy().tobytes() for name, t in found.items()}


def batch(count=8):
    return (torch.rand(count, 1, 16, 16) > 0.5).float()


def moved(before, after):
    return {name for name in after if before.get(name) != after[name]}
