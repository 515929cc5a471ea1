"""Draw images from a model: a PNG grid, and a .npz of all of them if asked for."""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model, temperatures
from nvae_fast.cli.pictures import (
    add_model_flags,
    add_output_flags,
    add_readjust_flags,
    check_pictures,
    check_room,
    readjust,
    write_pictures,
)

NAME = "sample"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("-n", "--num_samples", type=int, default=64, help="images [64]")
    parser.add_argument("--temperature", "--temp", dest="temperature", type=temperatures, default=0.7,
                        help="scale of every prior sigma; one number or one per group [0.7]")  # fmt: skip
    add_readjust_flags(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time [64]")
    add_output_flags(parser, "samples.png")


def run(args: argparse.Namespace) -> None:
    check_pictures(args)
    from nvae_fast.sampling import sample_images

    model = load_model(args.model, args)
    check_room(model, args.num_samples)
    readjust(model, args, args.temperature)
    images = sample_images(model, args.num_samples, temperature=args.temperature, batch_size=args.batch_size, seed=args.seed,
                           mean=args.mean_pixels)  # fmt: skip
    write_pictures(args, images, args.columns)
    print(f"{len(images)} samples at temperature {args.temperature}: {args.out}")
