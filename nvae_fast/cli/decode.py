"""Turn latents that `encode` wrote into images: to the bit those of `reconstruct` with the seed that they were drawn with."""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model
from nvae_fast.cli.pictures import BATCH, add_model_flags, add_output_flags, check_pictures, write_pictures

NAME = "decode"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    parser.add_argument("latents", help="file that nvae-fast encode wrote")
    parser.set_defaults(seed=None)  # that of the file
    add_output_flags(parser, "decoded.png")


def run(args: argparse.Namespace) -> None:
    check_pictures(args)
    import torch

    from nvae_fast.latents import load_latents
    from nvae_fast.sampling import decode

    model = load_model(args.model, args)
    latents, about = load_latents(args.latents, model)
    seed = args.seed if args.seed is not None else about["seed"]
    images = []
    for i in range(0, len(latents[0]), BATCH):
        images.append(decode(model, [z[i : i + BATCH] for z in latents], seed=seed + i // BATCH, mean=args.mean_pixels))
    write_pictures(args, torch.cat(images), args.columns)
    print(f"{len(latents[0])} images of latents: {args.out}")
