"""Walk from image to image through the latents: a PNG grid, one row per pair of images.

A latent z on the way from a to b, t from 0 to 1: linear (1 - t) a + t b; spherical (sin((1 - t) w) a + sin(t w) b) / sin(w),
w the angle between a and b, group by group. Images are taken in pairs: the first and the second, the third and the fourth, ...
"""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model
from nvae_fast.cli.pictures import (
    add_data_flags,
    add_model_flags,
    add_output_flags,
    check_pictures,
    check_room,
    indices,
    load_images,
    write_pictures,
)
from nvae_fast.errors import InputError

NAME = "interpolate"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser, 8)
    parser.add_argument("--steps", type=int, default=9, help="images in a row, the two ends among them [9]")
    parser.add_argument("--path", default="linear", choices=("linear", "spherical"), help="linear or spherical [linear]")
    parser.add_argument("--groups", type=indices, help="latent groups that move, 0 the smallest, as 0,1 [all]")
    add_output_flags(parser, "interpolation.png", columns=None)


def run(args: argparse.Namespace) -> None:
    check_pictures(args)
    from nvae_fast.latents import interpolate

    model = load_model(args.model, args)
    x = load_images(model, args)
    if len(x) < 2:
        raise InputError(f"{len(x)} image: an interpolation takes pairs; give --num-images 2 or more")
    pairs = len(x) // 2
    check_room(model, pairs * args.steps)
    rows = interpolate(model, x[: 2 * pairs : 2], x[1 : 2 * pairs : 2], args.steps, path=args.path, groups=args.groups,
                       seed=args.seed, mean_latents=args.mean_latents, mean_pixels=args.mean_pixels)  # fmt: skip
    write_pictures(args, rows.flatten(0, 1), args.steps)
    print(f"{pairs} pairs, {args.steps} images each: {args.out}")
