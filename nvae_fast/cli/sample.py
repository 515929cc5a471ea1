"""Draw images from a model: a PNG grid, and a .npz of all of them if asked for."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.cli.flags import OnOff, add_device_flag, add_seed_flag, load_model, require_at_least_1, temperatures

NAME = "sample"


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
    add_seed_flag(parser)
    add_device_flag(parser)


def run(args: argparse.Namespace) -> None:
    require_at_least_1(args, "num_samples", "columns", "batch_size")
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
