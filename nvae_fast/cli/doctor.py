"""Look for the module that makes the loss or the gradients of a run NaN or infinite.

Repeats forward and backward of the next training batches from a checkpoint, changing nothing. Exit code 1 when it finds one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.cli.flags import add_device_flag, add_reading_flags, device_of, require_at_least_1, with_data

NAME = "doctor"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="run folder (its newest checkpoint counts), or a checkpoint folder of one")
    parser.add_argument("--data", help="training images [those of the run]")
    parser.add_argument("--dataset", help="how to read --data [as in training]")
    parser.add_argument("--batches", type=int, default=10, help="how many to look at [10]")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="[fp32]")
    add_device_flag(parser)
    add_reading_flags(parser)


def run(args: argparse.Namespace) -> int:
    require_at_least_1(args, "batches")
    import torch

    from nvae_fast.checkpoint.native import read_config
    from nvae_fast.model import NVAE
    from nvae_fast.optim import make_optimizer
    from nvae_fast.regularization import SpectralState
    from nvae_fast.training.data import loader, open_split
    from nvae_fast.training.distributed import Processes
    from nvae_fast.training.doctor import diagnose
    from nvae_fast.training.loop import schedule
    from nvae_fast.training.state import Checkpoints, restore
    from nvae_fast.training.step import TrainingStep

    device = device_of(args)
    folder = Checkpoints(Path(args.checkpoint) / "checkpoints").resolve(args.checkpoint)
    config = with_data(read_config(folder), args)
    model = NVAE(config).to(device, memory_format=torch.channels_last)
    step = TrainingStep(model, make_optimizer(model, ema_decay=config.training.ema_decay or None), SpectralState())
    p = restore(folder, step, torch.zeros(2, dtype=torch.float64, device=device), Processes(device=device))
    source = open_split(config, "train", image_size=config.data_size, max_corrupt=args.max_corrupt)
    batches = loader(config, source, train=True, workers=args.workers)
    batches.set_epoch(p.epoch, start_batch=min(p.batch, len(batches)))
    seen = 0
    while seen < args.batches:
        for x in batches:
            _, beta, lam = schedule(p, config.training, len(batches))
            found = diagnose(
                model, x.to(device), kl_coeff=beta, norm_coeff=lam, spectral=step.spectral, precision=args.precision
            )
            if found is not None:
                print(f"batch {p.batch + 1} of epoch {p.epoch + 1}: first in {found.where}: {found.what}")
                return 1
            seen, p.step, p.batch = seen + 1, p.step + 1, p.batch + 1
            torch.manual_seed(p.step)  # other noise; the first batch had that of the run
            if seen == args.batches:
                break
        else:
            p.epoch, p.batch = p.epoch + 1, 0
            batches.set_epoch(p.epoch)
    name, largest = max(((n, float(w.detach().abs().max())) for n, w in model.named_parameters()), key=lambda item: item[1])
    print(
        f"nothing: loss and gradients of {seen} batches from '{folder}' are finite in {args.precision}; its largest weight is "
        f"{largest:.3g}, in {name}"
    )
    return 0
