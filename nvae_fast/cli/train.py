"""Train a model.

Without any flag: the `demo` preset on its bundled images. With flags of the public NVAE code and no --preset, its defaults
hold, --data is a folder read as --dataset says, and the output goes to <root>/eval-<save>. Else it goes to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from nvae_fast.cli.flags import (
    MODEL_FIELDS,
    TRAIN_FIELDS,
    OnOff,
    add_config_flags,
    add_device_flags,
    data_reader,
    device_and_precision,
    image_size,
)
from nvae_fast.config import NVAEConfig
from nvae_fast.errors import InputError
from nvae_fast.presets import PRESETS

NAME = "train"
PROCESSES = {"num_proc_node": 1, "node_rank": 0, "num_process_per_node": 1, "local_rank": 0, "global_rank": 0}


def add_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help=f"one of {', '.join(PRESETS)}")
    run.add_argument("--data", help="demo, or a path: folder or zip of images, .npy, .npz, IDX, CIFAR-10, LMDBs")
    run.add_argument("--dataset", help="how to read --data [guessed]")
    run.add_argument("--image_size", type=image_size, metavar="H[xW]", help="resize and crop images to this [as they are]")
    run.add_argument("--out", help="folder of the run [runs/<preset>]")
    run.add_argument("--resume", nargs="?", const="auto", help="auto: go on in --out if it holds a run; or a checkpoint folder")
    run.add_argument("--log_every", type=int, default=10, help="steps between lines of metrics.jsonl [10]")
    run.add_argument("--valid_samples", type=int, default=1, help="importance samples in validations [1]")
    run.add_argument("--images", action=OnOff, default=True, help="write grids of samples and reconstructions [on]")
    run.add_argument("--bar", action=OnOff, default=True, help="show a progress bar [on]")
    add_device_flags(run)
    add_config_flags(parser)
    public = parser.add_argument_group("further flags of the public code")
    public.add_argument("--root", help="parent of the output folder")
    public.add_argument("--save", help="id of the run: output goes to <root>/eval-<save>")
    public.add_argument("--cont_training", action=OnOff, default=False, help="the same as --resume auto")
    public.add_argument("--fast_adamax", action=OnOff, default=None, help="accepted: the multi-tensor Adamax is always used")
    public.add_argument("--master_address", help="accepted: there is one process")
    for name, value in PROCESSES.items():
        public.add_argument(f"--{name}", type=int, default=None, help=f"only {value}: there is one process")


def build_config(args: argparse.Namespace) -> tuple[NVAEConfig, bool]:
    """(configuration of the flags, whether it may still be fitted to the data)."""
    given = {k: getattr(args, k) for k in MODEL_FIELDS + TRAIN_FIELDS if getattr(args, k) is not None}
    public = {"dataset", "root", "save", "fast_adamax", *MODEL_FIELDS}
    if args.preset is None and any(getattr(args, name) is not None for name in public):
        base = NVAEConfig.from_nvlabs_args({"dataset": args.dataset} if args.dataset else {})
        data, dataset, fit = args.data or "/tmp/nasvae/data", base.training.dataset, False
    else:
        base = PRESETS[args.preset or "demo"]
        usual, fit = base.training.dataset, True
        data, dataset = args.data or base.training.data, args.dataset or usual
        if args.data is not None:
            dataset = data_reader(args.data, args.dataset, usual)
    training = dataclasses.replace(
        base.training, data=data, dataset=dataset, **{k: v for k, v in given.items() if k in TRAIN_FIELDS}
    )
    return dataclasses.replace(base, training=training, **{k: v for k, v in given.items() if k in MODEL_FIELDS}), fit


def output_folder(args: argparse.Namespace, config: NVAEConfig) -> Path:
    """--out, or <root>/eval-<save> when one of these is given, or runs/<name>."""
    if args.out:
        return Path(args.out)
    if args.root or args.save:
        return Path(args.root or "/tmp/nasvae/expr") / f"eval-{args.save or 'exp'}"
    return Path("runs") / config.name


def run(args: argparse.Namespace) -> None:
    for name, value in PROCESSES.items():
        if getattr(args, name) not in (None, value):
            raise InputError(f"--{name}={getattr(args, name)}: this version trains in one process; leave it at {value}")
    for name in ("log_every", "valid_samples"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)} must be at least 1")
    config, fit = build_config(args)
    from nvae_fast.training import Trainer
    from nvae_fast.training.data import check_data, fit_to_data, open_split
    from nvae_fast.training.loop import Options

    device, precision = device_and_precision(args)
    train, valid = (open_split(config, split, image_size=args.image_size) for split in ("train", "valid"))
    if fit:
        config = fit_to_data(config, train, {k for k in ("padding", "binarize") if getattr(args, k) is not None})
    check_data(config, valid)
    options = Options(
        out=output_folder(args, config), device=device, precision=precision, workers=args.workers, log_every=args.log_every,
        resume=args.resume or ("auto" if args.cont_training else None), valid_samples=args.valid_samples, images=args.images,
        bar=args.bar,
    )  # fmt: skip
    trainer = Trainer(config, train, valid, options)
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    height, width = config.data_size
    print(
        f"{config.name}: {size:.2f} M parameters, {len(config.latent_shapes)} latent groups, {config.output_likelihood} "
        f"likelihood, {len(train)} + {len(valid)} images of {config.channels}x{height}x{width} ('{train.name}'), {device}, "
        f"{precision}, into {options.out}",
        file=sys.stderr,
    )
    if trainer.progress.step:
        print(f"resumed at step {trainer.progress.step} of {trainer.total_steps}", file=sys.stderr)
    result = trainer.run()
    if result is not None:
        unit = f"{result.nelbo:.2f} nats ({result.nelbo_bpd:.3f} bits/dim)"
        print(f"done: validation -ELBO {unit}; see {options.out}/samples and {options.out}/metrics.jsonl", file=sys.stderr)
    else:
        print(f"done before: all {config.training.epochs} epochs are trained; see {options.out}", file=sys.stderr)
