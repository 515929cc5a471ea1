"""Write the latents of images to a safetensors file, which `decode` turns back into images."""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import load_model
from nvae_fast.cli.pictures import BATCH, add_data_flags, add_model_flags, check_pictures, in_batches, load_images

NAME = "encode"


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser)
    add_data_flags(parser, 64)
    parser.add_argument("--out", default="latents.safetensors",
                        help="file of tensors latent/000 (the smallest group) and so on [latents.safetensors]")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    check_pictures(args, ".safetensors")
    import torch

    from nvae_fast.latents import save_latents
    from nvae_fast.sampling import encode

    model = load_model(args.model, args)
    x = load_images(model, args)
    batches = [encode(model, batch, seed=seed, mean=args.mean_latents) for batch, seed in in_batches(x, args.seed)]
    latents = [torch.cat(group) for group in zip(*batches, strict=True)]
    about = {"model": model.config.name, "images": len(x), "seed": args.seed, "batch": BATCH, "mean": args.mean_latents}
    save_latents(args.out, latents, about)
    size = sum(z[0].numel() for z in latents)
    print(f"latents of {len(x)} images, {size} numbers each in {len(latents)} groups: {args.out}")
