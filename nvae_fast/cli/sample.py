"""Draw images from a model: a PNG grid, and a .npz of all of them if asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.cli.flags import OnOff, add_device_flags, load_model
from nvae_fast.errors import InputError

NAME = "sample"


def temperatures(text: str) -> float | list[float]:
    """ "0.7", or one number per group, top-down, as "0.7,0.7,1.0"."""
    try:
        values = [float(t) for t in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no temperature: give 0.7, or 0.7,0.8,... with one per group") from None
    return values[0] if len(values) == 1 else values


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, checkpoint folder or official checkpoint.pt")
    parser.add_argument("-n", "--num_samples", type=int, default=64, help="images [64]")
    parser.add_argument("--temperature", "--temp", dest="temperature", type=temperatures, default=0.7,
                        help="scale of every prior sigma; one number or one per group [0.7]")  # fmt: skip
    parser.add_argument("--readjust_bn", action=OnOff, default=False, help="500 prior passes at this temperature first")
    parser.add_argument("--columns", type=int, default=8, help="images in a row of the grid [8]")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time [64]")
    parser.add_argument("--out", default="samples.png", help="PNG file of the grid [samples.png]")
    parser.add_argument("--npz", help="also write all images, float [N, C, H, W] in [0, 1], key 'samples'")
    parser.add_argument("--seed", type=int, default=1)
    add_device_flags(parser)


def run(args: argparse.Namespace) -> None:
    for name in ("num_samples", "columns", "batch_size"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name}={getattr(args, name)} must be at least 1")
    import numpy as np

    from nvae_fast.images import save_grid
    from nvae_fast.sampling import readjust_bn, sample_images

    model = load_model(args.model, args)
    if args.readjust_bn:
        readjust_bn(model, temperature=args.temperature, seed=args.seed)
    images = sample_images(model, args.num_samples, temperature=args.temperature, batch_size=args.batch_size, seed=args.seed)
    save_grid(images, Path(args.out), args.columns)
    if args.npz:
        atomic_write(args.npz, lambda file: np.savez_compressed(file, samples=images.numpy()))
    print(f"{len(images)} samples at temperature {args.temperature}: {args.out}")
