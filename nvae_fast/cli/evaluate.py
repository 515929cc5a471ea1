"""Score a model: likelihood of the validation images, and distances between its samples and the training images.

--metrics nll: ELBO and importance-weighted bound, in nats and bits/dim. fd, kd: Frechet and kernel distance, on --features.
They are called FID and KID only on the features of the FID network (--inception-weights pt_inception-2015-12-05-6726825d.pth).
The flags of the public evaluation are accepted; --eval_mode sample writes samples as it does (gpu_0_samples_*.npz).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvae_fast.checkpoint.files import atomic_write
from nvae_fast.cli.flags import (
    OnOff,
    add_device_flag,
    add_reading_flags,
    add_seed_flag,
    device_of,
    load_model,
    require_at_least_1,
    temperatures,
    with_data,
)
from nvae_fast.cli.pictures import add_ema_flag, add_readjust_flags, readjust
from nvae_fast.errors import InputError, out_of_memory, unknown

if TYPE_CHECKING:
    from nvae_fast.evaluation import Likelihood
    from nvae_fast.model import NVAE

NAME = "evaluate"
MODES = ("evaluate", "evaluate_fid", "sample")
METRICS = ("nll", "fd", "kd")
FID_FILE = "pt_inception-2015-12-05-6726825d.pth"
FILE = "evaluation.json"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="run folder, checkpoint folder or official checkpoint.pt")
    parser.add_argument("--checkpoint", help="the same as the positional argument")
    parser.add_argument("--metrics", default="nll", help="nll, fd, kd, or several, as nll,fd [nll]")
    parser.add_argument("--data", help="images to evaluate on [those of the training]")
    parser.add_argument("--dataset", help="how to read --data [guessed]")
    parser.add_argument(
        "--eval_mode", default="evaluate", help="evaluate; evaluate_fid: fd on the FID network; sample [evaluate]"
    )
    parser.add_argument("--eval_on_train", action=OnOff, default=False, help="likelihood of the training images")
    parser.add_argument("--num_iw_samples", type=int, default=100, help="posterior draws per image [100]")
    parser.add_argument("--rows", type=int, default=256, help="images x draws at a time [256]")
    parser.add_argument("--batch_size", type=int, default=0, help="images at a time [0: as in training; 100 of samples]")
    parser.add_argument("--limit", type=int, help="likelihood of the first LIMIT images only")
    add_readjust_flags(parser)
    parser.add_argument("--temperature", "--temp", dest="temperature", type=temperatures, default=0.7,
                        help="of the samples; one number or one per group [0.7]")  # fmt: skip
    parser.add_argument("--num_samples", type=int, default=50_000, help="samples to draw or to compare [50000]")
    parser.add_argument("--features", help="pixels, randconv or inception [randconv; inception where its weights are given]")
    parser.add_argument(
        "--inception_weights", metavar="FILE", help="state dict of the Inception network (.pth or .safetensors)"
    )
    parser.add_argument("--reference", default="train", choices=("train", "valid"),
                        help="images that samples are compared with, train or valid [train]")  # fmt: skip
    parser.add_argument("--mean_pixels", action=OnOff, default=True, help="compare means of the pixels, not draws [on]")
    parser.add_argument("--fid_dir", help=f"folder with {FID_FILE}, for --eval_mode evaluate_fid")
    parser.add_argument("--save", "--out", dest="save", help="folder of the results [the folder of the model]")
    parser.add_argument("--bar", action=OnOff, default=None, help="progress bar [where stderr is a terminal]")
    add_ema_flag(parser)
    add_seed_flag(parser)
    for name in ("master_address", "local_rank", "world_size"):
        parser.add_argument(f"--{name}", help="accepted: torchrun tells")
    add_device_flag(parser)
    add_reading_flags(parser)


def run(args: argparse.Namespace) -> None:
    if args.eval_mode not in MODES:
        raise InputError(f"--eval_mode {args.eval_mode} is not available: use {', '.join(MODES)}")
    require_at_least_1(args, "num_iw_samples", "num_samples", "rows")
    if args.batch_size < 0:
        raise InputError(f"--batch_size={args.batch_size} must be at least 0 (0: as in training)")
    metrics = args.metrics.split(",")
    for name in metrics:
        if name not in METRICS:
            raise unknown("metric", name, METRICS)
    if args.eval_mode == "evaluate_fid":
        metrics, args.features = ["fd"], "inception"
        args.inception_weights = args.inception_weights or (args.fid_dir and str(Path(args.fid_dir) / FID_FILE))
    if args.model and args.checkpoint and args.model != args.checkpoint:
        raise InputError(f"'{args.model}' and --checkpoint '{args.checkpoint}' are two models: give one")
    if args.save and Path(args.save).exists() and not Path(args.save).is_dir():
        raise InputError(f"--save '{args.save}' is a file: give a folder for the results")
    args.model = args.model or args.checkpoint
    args.features = args.features or ("inception" if args.inception_weights else "randconv")
    from nvae_fast.features import check_features
    from nvae_fast.training.distributed import joined

    check_features(args.features, args.inception_weights)  # now, not when the likelihood is done
    with joined(device_of(args)) as processes:
        args.device = str(processes.device)
        _score(args, metrics)


@out_of_memory()
def _score(args: argparse.Namespace, metrics: list[str]) -> None:
    from nvae_fast.readjust import fingerprint

    model = load_model(args.model, args)
    path = Path(args.model)
    folder = Path(args.save) if args.save else path if path.is_dir() else path.parent
    if args.eval_mode == "sample":
        _sample(model, folder, args)
        return
    weights = fingerprint(model)
    if "nll" in metrics:  # before BN re-adjustment, which is for samples
        _write(folder, weights, _likelihood(model, folder, args))
    if kinds := [m for m in metrics if m != "nll"]:
        _write(folder, weights, _distances(model, folder, args, kinds))
    _say(f"written to {folder / FILE}")


def _sample(model: NVAE, folder: Path, args: argparse.Namespace) -> None:
    import numpy as np

    from nvae_fast.evaluation import ranks
    from nvae_fast.sampling import check_finite, sample_batches

    readjust(model, args, args.temperature)
    rank, world = ranks()
    batches = sample_batches(model, args.num_samples, temperature=args.temperature, batch_size=args.batch_size or 100,
                             seed=args.seed, part=(rank, world))  # fmt: skip
    for i, images in enumerate(batches):
        file, array = folder / f"gpu_{rank}_samples_{i}.npz", check_finite(images).cpu().numpy()
        atomic_write(file, lambda out, x=array: np.savez_compressed(out, samples=x))
    _say(f"{args.num_samples} samples in {folder}/gpu_*_samples_*.npz")


def _likelihood(model: NVAE, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    from nvae_fast.evaluation import evaluate, ranks
    from nvae_fast.training.data import loader, open_split

    config = with_data(model.config, args)
    split = "train" if args.eval_on_train else "valid"
    source = open_split(config, split, image_size=config.data_size, max_corrupt=args.max_corrupt)
    rank, world = ranks()
    batches = loader(config, source, train=False, batch_size=args.batch_size or None, workers=args.workers, limit=args.limit,
                     rank=rank, world=world)  # fmt: skip
    bar = _bar(args, min(args.limit or len(source), len(source)) // world, "images")

    def show(result: Likelihood) -> None:
        bar.set_postfix_str(f"-ELBO {_figure(result.nelbo, result.nelbo_se)}, -log p "
                            f"{_figure(result.neg_log_p, result.neg_log_p_se)} nats", refresh=False)  # fmt: skip
        bar.update(result.images - bar.n)

    with bar:
        result = evaluate(model, batches, num_iw_samples=args.num_iw_samples, seed=args.seed, rows=args.rows, progress=show)
    _say(
        f"{result.images} images ({split}): -ELBO {_figure(result.nelbo, result.nelbo_se)} nats "
        f"({result.nelbo_bpd:.4f} bits/dim), -log p(x) <= {_figure(result.neg_log_p, result.neg_log_p_se)} nats "
        f"({result.neg_log_p_bpd:.4f} bits/dim) with {result.num_iw_samples} samples"
    )
    return result._asdict() | {"data": config.training.data, "split": split, "seed": args.seed}


def _distances(model: NVAE, folder: Path, args: argparse.Namespace, kinds: list[str]) -> dict[str, Any]:
    from nvae_fast.evaluation import ranks
    from nvae_fast.features import make_features, reference, score
    from nvae_fast.training.data import check_data, open_split

    config, device = with_data(model.config, args), model.prior_ftr0.device
    features = make_features(args.features, config.channels, device, args.inception_weights)
    source = open_split(config, args.reference, image_size=config.data_size, max_corrupt=args.max_corrupt)
    check_data(config, source)
    against = reference(source, features, folder, device)
    readjust(model, args, args.temperature)
    bar = _bar(args, args.num_samples // ranks()[1], "samples")
    with bar:
        found = score(model, against, features, kinds, num_samples=args.num_samples, seed=args.seed, mean=args.mean_pixels,
                      temperature=args.temperature, batch_size=args.batch_size or 100, progress=bar.update)  # fmt: skip
    how = {"temperature": args.temperature, "readjusted_bn": args.readjust_bn, "mean_pixels": args.mean_pixels,
           "data": config.training.data, "split": args.reference, "seed": args.seed}  # fmt: skip
    for label, distance in found.items():
        error = "" if distance.standard_error is None else f" +- {distance.standard_error:.2g}"
        _say(
            f"{label} {distance.value:.4g}{error}: {distance.samples} samples at temperature {args.temperature} against "
            f"{distance.reference_images} images ({args.reference})"
        )
    return {"distances": {label: distance._asdict() | how for label, distance in found.items()}}


def _figure(value: float, error: float) -> str:
    return f"{value:.2f}" if math.isnan(error) else f"{value:.2f} +- {error:.2f}"


def _main() -> bool:
    """Whether this is the process that speaks and writes the scores; there may be several (`evaluation.ranks`)."""
    from nvae_fast.evaluation import ranks

    return ranks()[0] == 0


def _say(text: str) -> None:
    if _main():
        print(text)


def _bar(args: argparse.Namespace, total: int, unit: str):
    from tqdm import tqdm

    shown = sys.stderr.isatty() if args.bar is None else args.bar
    return tqdm(total=total, unit=f" {unit}", disable=not (shown and _main()), dynamic_ncols=True)


def _write(folder: Path, weights: str, new: dict[str, Any]) -> None:
    """Join what is new with what evaluation.json says of the same weights."""
    from nvae_fast.checkpoint.native import finite, json_bytes

    if not _main():
        return
    try:
        old = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        old = {}
    if not isinstance(old, dict) or old.get("weights") != weights:
        old = {}
    if "distances" in old and "distances" in new:
        new["distances"] = old["distances"] | new["distances"]
    content = finite({"weights": weights, **old, **new})
    atomic_write(folder / FILE, lambda file: file.write(json_bytes(content)))
