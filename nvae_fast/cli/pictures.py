"""What the commands that make pictures share: flags, images to start from, and the files they write."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nvae_fast.cli.flags import (
    OnOff,
    add_device_flag,
    add_reading_flags,
    add_seed_flag,
    check_file,
    require_at_least_1,
    with_data,
)
from nvae_fast.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from nvae_fast.model import NVAE

BATCH = 64  # images at a time; fixed, because the last bits of an image may depend on it


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="run folder, checkpoint folder or official checkpoint.pt")
    add_ema_flag(parser)
    add_seed_flag(parser)
    add_device_flag(parser)


def add_ema_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ema", action=OnOff, default=True, help="averaged weights where the checkpoint has them [on]")


def add_data_flags(parser: argparse.ArgumentParser, images: int) -> None:
    parser.add_argument("--data", help="images to start from [those of the training]")
    parser.add_argument("--dataset", help="how to read --data [guessed]")
    parser.add_argument("--on_train", action=OnOff, default=False, help="use the training images, not the validation ones")
    parser.add_argument("-n", "--num_images", type=int, default=images, help=f"images, from the first on [{images}]")
    parser.add_argument("--indices", type=indices, help="these images instead, counted from 0, as 3,0,17")
    parser.add_argument("--mean_latents", action=OnOff, default=False, help="means of the posterior, not draws from it")
    add_reading_flags(parser)


def add_output_flags(parser: argparse.ArgumentParser, out: str, columns: int | None = 8) -> None:
    if columns is not None:
        parser.add_argument("--columns", type=int, default=columns, help=f"images in a row of the grid [{columns}]")
    parser.add_argument("--mean_pixels", action=OnOff, default=False,
                        help="means of the pixels, not draws (Bernoulli pixels are shown as means in any case)")  # fmt: skip
    parser.add_argument("--out", default=out, help=f"PNG file of the grid [{out}]")
    parser.add_argument("--npz", help="also write all images, uint8 [N, H, W, C], key 'images' (--data reads it back)")


def add_readjust_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--readjust_bn", action=OnOff, default=False,
                        help="BN statistics of samples at this temperature; kept beside the checkpoint")  # fmt: skip
    parser.add_argument("--readjust_passes", type=int, default=500, help="prior passes for them, of 16 images [500]")


def indices(text: str) -> list[int]:
    """ "3,0,17" as a list."""
    parts = text.split(",")
    if all(part.strip().isdecimal() for part in parts):
        return [int(part) for part in parts]
    raise argparse.ArgumentTypeError(f"'{text}' is no list of numbers: give them as 3,0,17")


def check_pictures(args: argparse.Namespace, suffix: str = ".png") -> None:
    """InputError for counts below 1, and for files named as if they were of another kind than `suffix` and .npz."""
    check_file("--out", args.out, suffix)
    check_file("--npz", getattr(args, "npz", None), ".npz")
    require_at_least_1(args, *(n for n in ("num_images", "columns", "num_samples", "batch_size", "steps") if hasattr(args, n)))


def check_room(model: NVAE, count: int) -> None:
    """InputError where `count` images and their grid do not fit into the memory of this machine."""
    import torch

    from nvae_fast.estimate import available_memory
    from nvae_fast.images import enlargement

    height, width = model.config.image_size
    shown = 3 * enlargement(height, width) ** 2
    need = count * height * width * (2 * 4 * model.config.channels + 3 * shown)  # twice in float32; in steps to the grid
    room = available_memory(torch.device("cpu"))
    if need > room:
        raise InputError(
            f"{count} images take {need / 2**30:.0f} GiB, and this machine has {room / 2**30:.0f}: ask for fewer; `evaluate "
            "--eval_mode sample` writes any number of samples"
        )


def load_images(model: NVAE, args: argparse.Namespace) -> Tensor:
    """The images [N, C, H, W] in [0, 1] that the flags name, as the model takes them."""
    import torch

    from nvae_fast.training.data import loader, open_split

    config = with_data(model.config, args)
    source = open_split(
        config, "train" if args.on_train else "valid", image_size=config.data_size, max_corrupt=args.max_corrupt
    )
    wanted = args.indices
    limit = args.num_images if wanted is None else max(wanted) + 1
    if wanted is not None and limit > len(source):
        raise InputError(f"--indices {limit - 1}: '{source.name}' has images 0 to {len(source) - 1}")
    check_room(model, min(limit, len(source)))
    images = torch.cat(list(loader(config, source, train=False, batch_size=BATCH, workers=args.workers, limit=limit)))
    return images if wanted is None else images[wanted]


def readjust(model: NVAE, args: argparse.Namespace, temperature: float | list[float]) -> None:
    """BN re-adjustment when asked for; says what was done on stderr."""
    if args.readjust_bn:
        from nvae_fast.checkpoint.native import resolve_checkpoint
        from nvae_fast.evaluation import ranks
        from nvae_fast.readjust import readjust_bn_cached

        require_at_least_1(args, "readjust_passes")
        path = Path(args.model)
        checkpoint = path if path.is_file() else resolve_checkpoint(path)
        done = readjust_bn_cached(model, checkpoint, temperature=temperature, iterations=args.readjust_passes)
        if ranks()[0] == 0:
            print(f"nvae-fast: {done}", file=sys.stderr)


def write_pictures(args: argparse.Namespace, grid: Tensor, columns: int, images: Tensor | None = None) -> None:
    """The grid [N, C, H, W] as a PNG, and `images` (None: the grid's) as .npz when asked for."""
    from nvae_fast.images import save_grid, save_npz
    from nvae_fast.sampling import check_finite

    check_finite(grid)
    save_grid(grid, args.out, min(columns, len(grid)))
    if args.npz:
        save_npz(grid if images is None else images, args.npz)


def in_batches(images: Tensor, seed: int) -> Iterable[tuple[Tensor, int]]:
    """Batches of `BATCH` images, each with a seed of its own."""
    return ((images[i : i + BATCH], seed + i // BATCH) for i in range(0, len(images), BATCH))
