"""Turn images into LMDBs that train fast: from a folder, zip, tar, .npz, IDX, CIFAR-10 or Glow's TFRecords.

With --dataset, the files are those that the public code reads for it. OUT appears only when it is whole.
"""

from __future__ import annotations

import argparse

from nvae_fast.cli.flags import OnOff, image_size, seed

NAME = "prepare"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="what --data takes when training")
    parser.add_argument("out", help="the new folder")
    parser.add_argument("--dataset", help="celeba_64, celeba_256, ffhq, imagenet_32, lsun_...: its size, crop and layout")
    parser.add_argument("--image_size", type=image_size, metavar="H[xW]", help="resize and crop images to this [as they are]")
    parser.add_argument("--read", help="how to read SOURCE: folder, zip, tar, npz, tfrecord, ... [guessed]")
    parser.add_argument("--seed", type=seed, default=1, help="of the split of a source that has none [1]")
    parser.add_argument("--valid_fraction", type=float, default=0.1, help="share of its validation images [0.1]")
    parser.add_argument("--max_corrupt", type=int, default=10, help="unreadable images to pass over in a split [10]")
    parser.add_argument("--bar", action=OnOff, default=True, help="show a progress bar [on]")


def run(args: argparse.Namespace) -> None:
    from nvae_fast.data.prepare import prepare

    counts = prepare(args.source, args.out, dataset=args.dataset, read=args.read, image_size=args.image_size, seed=args.seed,
                     valid_fraction=args.valid_fraction, max_corrupt=args.max_corrupt, bar=args.bar)  # fmt: skip
    print(f"{counts['train']} training and {counts['valid']} validation images in {args.out}: use --data {args.out}")
