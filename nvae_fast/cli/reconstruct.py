"""Pass images through a model: a PNG grid with the originals above their reconstructions."""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model
from nvae_fast.cli.pictures import (
    add_data_flags,
    add_model_flags,
    add_output_flags,
    check_pictures,
    in_batches,
    load_images,
    write_pictures,
)

NAME = "reconstruct"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser, 32)
    add_output_flags(parser, "reconstructions.png")


def run(args: argparse.Namespace) -> None:
    check_pictures(args)
    import torch

    from nvae_fast.images import side_by_side
    from nvae_fast.sampling import reconstruct_images

    model = load_model(args.model, args)
    x = load_images(model, args)
    means = {"mean_latents": args.mean_latents, "mean_pixels": args.mean_pixels}
    images = torch.cat([reconstruct_images(model, b, seed=seed, **means) for b, seed in in_batches(x, args.seed)])
    columns = min(args.columns, len(x))
    write_pictures(args, side_by_side(x, images, columns), columns, images)
    print(f"{len(images)} images and their reconstructions: {args.out}")
