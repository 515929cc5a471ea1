"""Likelihood of the validation images under a model: ELBO and importance-weighted bound, in nats and bits/dim.

The flags of the public evaluation are accepted; --eval_mode sample writes samples as it does (gpu_0_samples_*.npz).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.cli.flags import (
    OnOff,
    add_device_flag,
    add_seed_flag,
    add_workers_flag,
    load_model,
    require_at_least_1,
    temperatures,
    with_data,
)
from nvae_fast.errors import InputError

NAME = "evaluate"
MODES = ("evaluate", "sample")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="run folder, checkpoint folder or official checkpoint.pt")
    parser.add_argument("--checkpoint", help="the same as the positional argument")
    parser.add_argument("--data", help="images to evaluate on [those of the training]")
    parser.add_argument("--dataset", help="how to read --data [guessed]")
    parser.add_argument("--eval_mode", default="evaluate", help="evaluate or sample [evaluate]")
    parser.add_argument("--eval_on_train", action=OnOff, default=False, help="use the training images")
    parser.add_argument("--num_iw_samples", type=int, default=100, help="posterior draws per image [100]")
    parser.add_argument("--batch_size", type=int, default=0, help="images at a time [0: as in training]")
    parser.add_argument("--limit", type=int, help="evaluate the first LIMIT images only")
    parser.add_argument("--readjust_bn", action=OnOff, default=False, help="500 prior passes at --temp first (sample)")
    parser.add_argument("--temp", type=temperatures, default=0.7, help="temperature (sample) [0.7]")
    parser.add_argument("--num_samples", type=int, default=50_000, help="images to draw (sample) [50000]")
    parser.add_argument("--save", "--out", dest="save", help="folder of the results [the folder of the model]")
    add_seed_flag(parser)
    for name in ("fid_dir", "master_address", "local_rank", "world_size"):
        parser.add_argument(f"--{name}", help="accepted: there is one process" if name != "fid_dir" else "accepted, unused")
    add_device_flag(parser)
    add_workers_flag(parser)


def run(args: argparse.Namespace) -> None:
    if args.eval_mode not in MODES:
        raise InputError(f"--eval_mode {args.eval_mode} is not available: use {' or '.join(MODES)}")
    require_at_least_1(args, "num_iw_samples", "num_samples")
    if args.batch_size < 0:
        raise InputError(f"--batch_size={args.batch_size} must be at least 0 (0: as in training)")
    path = args.model or args.checkpoint
    model = load_model(path, args)
    folder = Path(args.save) if args.save else Path(path) if Path(path).is_dir() else Path(path).parent
    if args.eval_mode == "sample":
        _sample(model, folder, args)
    else:
        _evaluate(model, folder, args)


def _sample(model, folder: Path, args: argparse.Namespace) -> None:
    import numpy as np

    from nvae_fast.sampling import readjust_bn, sample_images

    if args.readjust_bn:
        readjust_bn(model, temperature=args.temp, seed=args.seed)
    for i, start in enumerate(range(0, args.num_samples, 100)):
        n = min(100, args.num_samples - start)
        images = sample_images(model, n, temperature=args.temp, batch_size=args.batch_size or 100, seed=args.seed + i)
        atomic_write(folder / f"gpu_0_samples_{i}.npz", lambda file, x=images: np.savez_compressed(file, samples=x.numpy()))
    print(f"{args.num_samples} samples in {folder}/gpu_0_samples_*.npz")


def _evaluate(model, folder: Path, args: argparse.Namespace) -> None:
    from nvae_fast.evaluation import evaluate
    from nvae_fast.training.data import loader, open_split

    config = with_data(model.config, args)
    split = "train" if args.eval_on_train else "valid"
    source = open_split(config, split, image_size=config.data_size)
    batches = loader(config, source, train=False, batch_size=args.batch_size or None, workers=args.workers, limit=args.limit)
    result = evaluate(model, batches, num_iw_samples=args.num_iw_samples, seed=args.seed)
    values = result._asdict() | {"data": config.training.data, "split": split, "seed": args.seed}
    print(
        f"{result.images} images ({split}): -ELBO {result.nelbo:.2f} nats ({result.nelbo_bpd:.4f} bits/dim), "
        f"-log p(x) <= {result.neg_log_p:.2f} nats ({result.neg_log_p_bpd:.4f} bits/dim) with {result.num_iw_samples} samples; "
        f"written to {folder / 'evaluation.json'}"
    )
    atomic_write(folder / "evaluation.json", lambda file: file.write((json.dumps(values, indent=1) + "\n").encode()))
