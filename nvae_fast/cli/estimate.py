"""Tell how much memory a training run takes, by part, and the largest batch that fits, before anything is trained.

Takes the flags of `train`. The last row is the same model in plain PyTorch. Bytes are those of tensors: allocators, libraries
and the process itself come on top. With --launches: how many kernels a GPU would run for a training step instead, of both.
"""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from nvae_fast.cli import train
from nvae_fast.errors import InputError

if TYPE_CHECKING:
    from nvae_fast.config import NVAEConfig
    from nvae_fast.estimate import Footprint

NAME = "estimate"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def size(text: str) -> int:
    """Bytes of "24GB", "24 GiB", "800M": powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    count = float(match[1]) * UNITS[match[2].upper()] if match else 0
    if not 0 < count < UNITS["T"] ** 2:
        raise InputError(f"--budget={text[:40]}: expected a size such as 24GB or 800M")
    return int(count)


def add_flags(parser: argparse.ArgumentParser) -> None:
    train.add_flags(parser)
    parser.add_argument("--budget", help="memory to fit into, as 24GB [what this machine, or its GPU, has]")
    parser.add_argument(
        "--launches",
        action="store_true",
        help="count what a GPU would launch for a step and for samples, without one (minutes for deep models)",
    )


def run(args: argparse.Namespace) -> None:
    budget = None if args.budget is None else size(args.budget)
    config, _ = train.build_config(args)
    from nvae_fast.cli.flags import device_of
    from nvae_fast.estimate import Tracer, available_memory
    from nvae_fast.kernels.inverted_residual import MEMORY
    from nvae_fast.training.data import fit_to_size

    if args.image_size is not None:
        config = fit_to_size(config, args.image_size, {"padding"} if args.padding is not None else set())
    device = device_of(args)
    precision = train.precision_of(args, device)
    if args.launches:
        print_launches(config, precision, args.memory)
        return
    budget = available_memory(device) if budget is None else budget
    tracer = Tracer(config, precision=precision)
    batch = config.training.batch_size
    found = {mode: tracer.footprint(mode, batch) for mode in MEMORY}
    any_mode = next(iter(found.values()))
    height, width = config.image_size
    print(
        f"{config.name}: {tracer.parameters / 1e6:.2f} M parameters, {len(config.latent_shapes)} latent groups, images of "
        f"{config.channels}x{height}x{width}, batch {batch}, {precision}"
    )
    for name, part in (("weights", any_mode.weights), ("gradients", any_mode.gradients), ("optimiser", any_mode.optimizer)):
        print(f"  {name:10s} {readable(part):>10s}")
    rows = {f"--memory {mode}": f for mode, f in found.items()} | {"plain PyTorch": plain_footprint(config, precision)}
    print(f"  {'':17s} kept for backward   peak of a step   an image more   largest batch in {readable(budget)}")
    for name, f in rows.items():
        print(
            f"  {name:17s} {readable(f.kept):>17s}   {readable(f.peak):>14s}   {readable(f.per_image):>13s}   "
            f"{f.largest_batch(budget):16d}"
        )


def plain_footprint(config: NVAEConfig, precision: str) -> Footprint:
    """That of the published formulation on torch's own operations, channels-last."""
    from nvae_fast.benchmarks.plain import plain
    from nvae_fast.estimate import Tracer

    return Tracer(config, precision=precision, rival=plain).footprint("fast", config.training.batch_size)


def print_launches(config: NVAEConfig, precision: str, memory: str) -> None:
    """The counts of `benchmarks.launches`, in all and by name down to those that are a hundredth of ours."""
    from nvae_fast.benchmarks.launches import GOAL, UPLOAD, count, count_sampling

    ours, without, plain = count(config, precision=precision, memory=memory)
    own, uploads = (sum(n for name, n in ours.items() if pick(name)) for pick in (is_kernel, UPLOAD.__eq__))
    verdict = "at most" if ours.total() <= GOAL else "ABOVE"
    batch, rest = config.training.batch_size, ours.total() - own - uploads
    print(
        f"{config.name}, batch {batch}, {precision}, memory {memory}: launches of a training step on a GPU, counted without one"
    )
    parts = f"{own} of our kernels, {uploads} uploads, {rest} of torch's operations"
    print(f"  ours   {ours.total():6d}: {parts}; {verdict} the {GOAL} aimed at")
    if without != ours:
        print(f"         {without.total():6d} where the extension was built without CUDA, with Triton's kernels alone")
    print(f"  plain  {plain.total():6d}: {plain.total() / ours.total():.1f} times as many")
    for name, n in ours.most_common():
        if n >= ours.total() / 100:
            print(f"  {n:6d}  {name}")
    ours, plain = count_sampling(config)
    own = sum(n for name, n in ours.items() if is_kernel(name))
    print(f"a batch of samples, fp32: ours {ours.total()} ({own} of our kernels), plain {plain.total()}: "
          f"{plain.total() / ours.total():.1f} times as many")  # fmt: skip


def is_kernel(name: str) -> bool:
    """Whether a launch of that name is one of our kernels."""
    return name.endswith("_kernel")


def readable(count: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
