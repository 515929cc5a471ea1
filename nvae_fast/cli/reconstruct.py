"""Pass images through a model: a PNG grid with the originals above their reconstructions."""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.cli.flags import (
    OnOff,
    add_device_flag,
    add_seed_flag,
    add_workers_flag,
    load_model,
    require_at_least_1,
    with_data,
)

NAME = "reconstruct"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, checkpoint folder or official checkpoint.pt")
    parser.add_argument("--data", help="images to reconstruct [those of the training]")
    parser.add_argument("--dataset", help="how to read --data [guessed]")
    parser.add_argument("--on_train", action=OnOff, default=False, help="use the training images, not the validation ones")
    parser.add_argument("-n", "--num_images", type=int, default=32, help="images [32]")
    parser.add_argument("--columns", type=int, default=8, help="images in a row of the grid [8]")
    parser.add_argument("--out", default="reconstructions.png", help="PNG file of the grid [reconstructions.png]")
    add_seed_flag(parser)
    add_device_flag(parser)
    add_workers_flag(parser)


def run(args: argparse.Namespace) -> None:
    require_at_least_1(args, "num_images", "columns")
    import torch

    from nvae_fast.images import save_grid, side_by_side
    from nvae_fast.sampling import reconstruct_images
    from nvae_fast.training.data import loader, open_split

    model = load_model(args.model, args)
    config = with_data(model.config, args)
    source = open_split(config, "train" if args.on_train else "valid", image_size=config.data_size)
    batches = list(loader(config, source, train=False, batch_size=64, workers=args.workers, limit=args.num_images))
    images = torch.cat([reconstruct_images(model, x, seed=args.seed + i) for i, x in enumerate(batches)])
    save_grid(side_by_side(torch.cat(batches), images, args.columns), Path(args.out), args.columns)
    print(f"{len(images)} images and their reconstructions: {args.out}")
