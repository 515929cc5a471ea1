"""Train a model.

Without any flag: the `demo` preset on its bundled images. With flags of the public NVAE code and no --preset, its defaults
hold, --data is a folder read as --dataset says, and the output goes to <root>/eval-<save>. Else it goes to --out.

Several processes, one per GPU (or several on a CPU): torchrun --nproc_per_node N -m nvae_fast.cli train ..., or
--num_process_per_node N. --batch_size is that of each, batch norms are joined.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nvae_fast.cli.flags import (
    MODEL_FIELDS,
    TRAIN_FIELDS,
    OnOff,
    add_config_flags,
    add_data_flags,
    add_device_flag,
    data_options,
    data_reader,
    device_of,
    require_at_least_1,
)
from nvae_fast.config import NVLABS_DATASETS, NVAEConfig
from nvae_fast.data import DATASETS
from nvae_fast.errors import InputError, RunError, out_of_memory, unknown
from nvae_fast.presets import PRESETS

if TYPE_CHECKING:
    from nvae_fast.training.distributed import Processes

NAME = "train"
OWN = {"likelihood", "padding", "compat"}  # fields of the model that are no flags of the public code
PROCESSES = {  # flags of the public code: default, meaning
    "num_process_per_node": (1, "processes on this machine, one per GPU; torchrun does the same [1]"),
    "num_proc_node": (1, "machines; start the command on each of them [1]"),
    "node_rank": (0, "which of them this is, from 0 [0]"),
    "local_rank": (None, "set by what starts the processes"),
    "global_rank": (None, "set by what starts the processes"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--preset", help=f"one of {', '.join(PRESETS)}")
    run.add_argument("--config", metavar="FILE", help="YAML file of flags by name (`epochs: 3`); those given here win")
    add_data_flags(run)
    run.add_argument("--out", help="folder of the run [runs/<preset>]")
    run.add_argument("--resume", nargs="?", const="auto", help="auto: go on in --out if it holds a run; or a checkpoint folder")
    run.add_argument("--log_every", type=int, default=10, help="steps between lines of metrics.jsonl [10]")
    run.add_argument("--valid_samples", type=int, default=1, help="importance samples in validations [1]")
    run.add_argument("--save_every", type=int, default=0, help="steps between checkpoints within an epoch [0: at its end only]")
    run.add_argument("--keep", type=int, default=1, help="newest checkpoints that stay, beside the best one [1]")
    skipped = "steps skipped in a row for non-finite values before the run goes back to its last checkpoint [10]"
    run.add_argument("--max_skipped", type=int, default=10, help=skipped)
    run.add_argument("--images", action=OnOff, default=True, help="write grids of samples and reconstructions [on]")
    run.add_argument("--bar", action=OnOff, default=True, help="show a progress bar [on]")
    add_device_flag(run)
    run.add_argument(
        "--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"), help="[auto: bf16 on GPUs, else fp32]"
    )
    run.add_argument("--graph", action=OnOff, default=None, help="replay the step as one CUDA graph [on one GPU: on]")
    memory = "what cells keep for backward; low keeps least and computes most again [balanced]"
    run.add_argument("--memory", default="balanced", choices=("fast", "balanced", "low"), help=memory)
    add_config_flags(parser)
    public = parser.add_argument_group("further flags of the public code")
    public.add_argument("--root", help="parent of the output folder")
    public.add_argument("--save", help="id of the run: output goes to <root>/eval-<save>")
    public.add_argument("--cont_training", action=OnOff, default=False, help="the same as --resume auto")
    public.add_argument("--fast_adamax", action=OnOff, default=None, help="accepted: the multi-tensor Adamax is always used")
    public.add_argument("--master_address", help="of the machine with --node_rank 0; its port 6020 must be free")
    for name, (default, text) in PROCESSES.items():
        public.add_argument(f"--{name}", type=int, default=default, help=text)


def build_config(args: argparse.Namespace) -> tuple[NVAEConfig, bool]:
    """(configuration of the flags, whether it may still be fitted to the data)."""
    given = {k: getattr(args, k) for k in MODEL_FIELDS + TRAIN_FIELDS if getattr(args, k) is not None}
    if args.batch_size == "auto":  # chosen when the data are known
        del given["batch_size"]
    if args.dataset is not None and args.dataset not in DATASETS:
        raise unknown("dataset", args.dataset, DATASETS)
    public = {"dataset", "root", "save", "fast_adamax", *MODEL_FIELDS} - OWN
    if args.preset is None and any(getattr(args, name) is not None for name in public):
        fit = args.dataset not in (None, *NVLABS_DATASETS)  # a reader that the public code lacks: the data say more
        base = NVAEConfig.from_nvlabs_args({"dataset": args.dataset} if args.dataset and not fit else {})
        base = dataclasses.replace(base, name=args.dataset or base.name)
        data, dataset = args.data or "/tmp/nasvae/data", args.dataset or base.training.dataset
    else:
        base = PRESETS[args.preset or "demo"]
        usual, fit = base.training.dataset, True
        data, dataset = args.data or base.training.data, args.dataset or usual
        if args.data is not None:
            dataset = data_reader(args.data, args.dataset, usual)
    training = dataclasses.replace(
        base.training, data=data, dataset=dataset, **{k: v for k, v in given.items() if k in TRAIN_FIELDS}
    )
    return dataclasses.replace(base, training=training, **{k: v for k, v in given.items() if k in MODEL_FIELDS}), fit


def precision_of(args: argparse.Namespace, device) -> str:
    """--precision, or what "auto" stands for on the device."""
    return args.precision if args.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def output_folder(args: argparse.Namespace, config: NVAEConfig) -> Path:
    """--out, or <root>/eval-<save> when one of these is given, or runs/<name>."""
    if args.out:
        return Path(args.out)
    if args.root or args.save:
        return Path(args.root or "/tmp/nasvae/expr") / f"eval-{args.save or 'exp'}"
    return Path("runs") / config.name


def run(args: argparse.Namespace) -> int | None:
    require_at_least_1(args, "log_every", "valid_samples", "keep", "max_skipped")
    if args.save_every < 0:
        raise InputError(f"--save_every={args.save_every} must be at least 0 (0: at the end of an epoch only)")
    config, fit = build_config(args)
    count, nodes, node = machines(args)
    from nvae_fast.training.distributed import environment, joined

    if count * nodes > 1 and environment() is None:
        from nvae_fast.training.launch import launch

        return launch(args.argv, processes=count, nodes=nodes, node=node, address=args.master_address or "127.0.0.1")
    with joined(device_of(args)) as processes:
        train(args, config, fit, processes)
    return None


def machines(args: argparse.Namespace) -> tuple[int, int, int]:
    """(processes on this machine, machines, which of them this is) as the flags of the public code say."""
    count, nodes, node = args.num_process_per_node, args.num_proc_node, args.node_rank
    require_at_least_1(args, "num_process_per_node", "num_proc_node")
    if not 0 <= node < nodes:
        raise InputError(f"--node_rank={node}: expected 0 to {nodes - 1}, below --num_proc_node={nodes}")
    if nodes > 1 and args.master_address is None:
        raise InputError(f"--num_proc_node={nodes} without --master_address: give the address of the machine of --node_rank 0")
    for name in ("local_rank", "global_rank"):
        if getattr(args, name):
            raise InputError(
                f"--{name}={getattr(args, name)}: ranks are set by torchrun or --num_process_per_node; leave it away"
            )
    return count, nodes, node


@out_of_memory()
def train(args: argparse.Namespace, config: NVAEConfig, fit: bool, processes: Processes) -> None:
    """The run of one process; the first one says what it is about and how it ended."""
    import torch

    from nvae_fast.training import Trainer
    from nvae_fast.training.data import check_data, fit_to_data, open_split
    from nvae_fast.training.fit import check_fits, largest_batch
    from nvae_fast.training.loop import Options
    from nvae_fast.training.start import saved_batch
    from nvae_fast.training.state import Checkpoints

    device = processes.device
    torch.backends.cudnn.deterministic = True  # one seed, one machine, one build: the same losses to the bit
    precision = precision_of(args, device)
    images, valid = (open_split(config, split, **data_options(args)) for split in ("train", "valid"))
    if fit:
        config = fit_to_data(config, images, {k for k in ("padding", "binarize") if getattr(args, k) is not None})
    check_data(config, valid)
    options = Options(
        out=output_folder(args, config), device=device, precision=precision, workers=args.workers, log_every=args.log_every,
        resume=args.resume or ("auto" if args.cont_training else None), valid_samples=args.valid_samples, images=args.images,
        bar=args.bar, memory=args.memory, save_every=args.save_every, keep=args.keep, max_skipped=args.max_skipped,
        graph=device.type == "cuda" and processes.size == 1 if args.graph is None else args.graph,
    )  # fmt: skip

    def say(text: str) -> None:
        if processes.main:
            print(text, file=sys.stderr)

    if args.batch_size == "auto":
        batch = saved_batch(Checkpoints(options.out / "checkpoints"), options.resume, processes.size) or largest_batch(
            config, len(images), args.memory, precision, processes
        )
        say(f"--batch_size auto: {batch}")
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, batch_size=batch))
    else:
        check_fits(config, args.memory, precision, processes)
    trainer = Trainer(config, images, valid, options, processes)
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    height, width = config.data_size
    where = f"{device}" if processes.size == 1 else f"{processes.size} processes on {device.type}"
    say(
        f"{config.name}: {size:.2f} M parameters, {len(config.latent_shapes)} latent groups, {config.output_likelihood} "
        f"likelihood, {len(images)} + {len(valid)} images of {config.channels}x{height}x{width} ('{images.name}'), {where}, "
        f"{precision}, into {options.out}"
    )
    if trainer.progress.step:
        say(f"resumed at step {trainer.progress.step} of {trainer.total_steps}")
    result = trainer.run()
    if result is not None and not math.isfinite(result.nelbo):
        raise RunError(
            f"trained, but the validation is {result.nelbo}: the weights in '{options.out}' are of no use; raise "
            "--weight_decay_norm or lower --learning_rate, and train again"
        )
    if result is not None:
        unit = f"{result.nelbo:.2f} nats ({result.nelbo_bpd:.3f} bits/dim)"
        say(f"done: validation -ELBO {unit}; see {options.out}/samples and {options.out}/metrics.jsonl")
    else:
        say(f"done before: all {config.training.epochs} epochs are trained; see {options.out}")
