"""Vary one latent group of images and hold all others: a PNG grid, one row per image, which stands first.

Without --reach the group is drawn anew from its prior given the groups above it, z = mu + temperature sigma e; with --reach R
it moves along one random direction d, z + s sigma d for s from -R to R. --channel C touches that channel of the group alone.
"""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model, temperatures
from nvae_fast.cli.pictures import (
    add_data_flags,
    add_model_flags,
    add_output_flags,
    check_pictures,
    check_room,
    load_images,
    write_pictures,
)
from nvae_fast.errors import InputError

NAME = "traverse"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser, 8)
    parser.add_argument("--group", type=int, default=0, help="latent group to vary, 0 the smallest [0]")
    parser.add_argument("--channel", type=int, help="only this channel of it [all]")
    parser.add_argument("--steps", type=int, default=9, help="images in a row [9]")
    parser.add_argument("--reach", type=float, help="move along a direction this far, in prior sigmas [draw anew instead]")
    parser.add_argument("--temperature", "--temp", dest="temperature", type=temperatures, default=1.0,
                        help="scale of sigma when drawing anew [1.0]")  # fmt: skip
    add_output_flags(parser, "traversal.png", columns=None)


def run(args: argparse.Namespace) -> None:
    check_pictures(args)
    if isinstance(args.temperature, list):
        raise InputError(f"--temperature {args.temperature}: one group is drawn, so give one number")
    from nvae_fast.latents import traverse
    from nvae_fast.sampling import encode

    model = load_model(args.model, args)
    x = load_images(model, args)
    check_room(model, len(x) * args.steps)
    latents = encode(model, x, seed=args.seed, mean=args.mean_latents)
    rows = traverse(model, latents, args.group, args.steps, reach=args.reach, channel=args.channel,
                    temperature=args.temperature, seed=args.seed, mean_pixels=args.mean_pixels)  # fmt: skip
    write_pictures(args, rows.flatten(0, 1), args.steps)
    print(f"group {args.group} of {len(rows)} images, {args.steps} images each: {args.out}")
