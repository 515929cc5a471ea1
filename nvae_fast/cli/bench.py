"""Measure the fused ops, or whole cells, against plain PyTorch, eager and compiled, in the same run.

Every implementation is checked against float64 first; a ratio is printed only where the numbers are right.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from nvae_fast.checkpoint.files import atomic_write, writing
from nvae_fast.cli.estimate import size
from nvae_fast.cli.flags import OnOff, add_device_flag, check_file, device_of
from nvae_fast.errors import InputError, RunError, unknown
from nvae_fast.presets import PRESETS

if TYPE_CHECKING:
    import torch

    from nvae_fast.benchmarks.nvlabs import Checkout
    from nvae_fast.config import NVAEConfig

NAME = "bench"
WHOLE = ("step", "sampling", "memory", "optimizer", "check")  # suites that are no list of cases
NVLABS_SUITES = ("step", "sampling", "memory")
FEWEST_ROUNDS = 3  # for quartiles


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        default="ops",
        help="ops, cell (a decoder cell and its branch), step (a training step), sampling, memory (of a step, and the largest "
        "batch), optimizer, or check (numbers only) [ops]",
    )
    parser.add_argument("--preset", default="demo", help="of the suites step, sampling and memory [demo]")
    parser.add_argument("--layers", type=int, help="at most so many groups of a scale and cells of a kind: a shorter model")
    parser.add_argument("--batch_size", type=int, help="images of a step [the preset's] or of a sampling [16]")
    parser.add_argument("--precision", default="fp32", help="fp32 or bf16, of a training step [fp32]")
    parser.add_argument(
        "--nvlabs", metavar="PATH", help="your checkout of NVlabs/NVAE, as a rival in the suites step, sampling and memory"
    )
    parser.add_argument("--budget", help="memory that the largest batch has to fit into, as 24GB [what there is]")
    parser.add_argument("--case", help="only cases whose names contain this, as depthwise or 16x384")
    parser.add_argument("--rounds", type=int, default=20, help="times that each implementation runs, in turn [20]")
    parser.add_argument("--threads", type=int, help="CPU threads [torch's choice]")
    parser.add_argument("--compile", action=OnOff, default=True, help="torch.compile as a rival: slow to start [on]")
    parser.add_argument("--max_autotune", action=OnOff, default=False, help="and its mode max-autotune: slower still [off]")
    parser.add_argument("--json", metavar="FILE", help="write all rows")
    parser.add_argument(
        "--plot", metavar="FILE.png", help="draw all rows as bars, and ops under the roofline (needs matplotlib)"
    )
    add_device_flag(parser)


def run(args: argparse.Namespace) -> None:
    from nvae_fast.benchmarks import report
    from nvae_fast.benchmarks.cases import SUITES, select
    from nvae_fast.benchmarks.plot import require_matplotlib, save_plot
    from nvae_fast.benchmarks.suite import measure

    if args.suite not in SUITES:
        raise unknown("suite", args.suite, SUITES)
    device = device_of(args)
    cases = select(args.suite, args.case, gpu=device.type == "cuda") if args.suite not in WHOLE else []
    config = configuration(args)
    checkout = published(args, config)
    if args.rounds < FEWEST_ROUNDS:
        raise InputError(f"--rounds={args.rounds} must be at least {FEWEST_ROUNDS}")
    if args.threads is not None:
        set_threads(args.threads)
    if args.plot:
        check_file("--plot", args.plot, ".png")
        require_matplotlib()
    for path in filter(None, (args.json, args.plot)):
        check_writable(Path(path))

    if args.suite == "check":
        check_numbers(args, device)
        return
    rates = report.rates(device)
    about = report.facts(device)
    print(f"{about['device']} ({about['cpu']}), {about['threads']} threads, torch {about['torch']}, "
          f"copy {rates['copy'] / 1e9:.1f} GB/s, products {rates['products'] / 1e9:.0f} GFLOP/s")  # fmt: skip
    print(report.LEGEND)
    rows = [] if cases else whole(args, config, device, rates["copy"], checkout)
    for case in cases:
        new = measure(case, rounds=args.rounds, device=device, copy_rate=rates["copy"], compilers=compilers(args))
        print(*report.table(new), sep="\n", flush=True)
        rows += new
    document = report.document(rows, device, rates)
    write_json(args.json, document)
    if args.plot:
        save_plot(document, args.plot)


def compilers(args: argparse.Namespace) -> list[str]:
    """The rivals under torch.compile that were asked for."""
    return [name for name, wanted in (("compile", args.compile), ("max_autotune", args.max_autotune)) if wanted]


def configuration(args: argparse.Namespace) -> NVAEConfig:
    """What --preset, --layers and --batch-size stand for; InputError for values that cannot be."""
    from nvae_fast.benchmarks.steps import shrunk

    if args.batch_size is not None and args.batch_size < 1:
        raise InputError(f"--batch-size={args.batch_size} must be at least 1")
    if args.budget is not None:
        size(args.budget)
    if args.precision not in ("fp32", "bf16"):
        raise InputError(f"--precision '{args.precision}': expected fp32 or bf16")
    if args.precision != "fp32" and args.suite != "step":
        raise InputError(f"--precision {args.precision} is of the suite step: suite '{args.suite}' has its own types")
    return shrunk(PRESETS[args.preset], args.layers, None if args.suite == "sampling" else args.batch_size)


def published(args: argparse.Namespace, config: NVAEConfig) -> Checkout | None:
    """The checkout that --nvlabs names; InputError where it is none, or has no model of `config`."""
    if args.nvlabs is None:
        return None
    if args.suite not in NVLABS_SUITES:
        raise InputError(f"--nvlabs competes in the suites {', '.join(NVLABS_SUITES)}, not in '{args.suite}': leave it out")
    from nvae_fast.benchmarks.nvlabs import Checkout, arguments

    arguments(config)
    return Checkout(args.nvlabs)


def whole(
    args: argparse.Namespace, config: NVAEConfig, device: torch.device, copy_rate: float, checkout: Checkout | None
) -> list[dict]:
    """The rows of a suite that has no table of cases, printed too."""
    from nvae_fast.benchmarks import memory, report

    table, both = report.table, {"rounds": args.rounds, "device": device}
    if args.suite == "step":
        from nvae_fast.benchmarks.steps import measure_step
        from nvae_fast.training.step import PRECISIONS

        dtype = PRECISIONS[args.precision]
        rows = measure_step(config, compilers=compilers(args), dtype=dtype, checkout=checkout, **both)
    elif args.suite == "sampling":
        from nvae_fast.benchmarks.sampling import BATCH, measure_sampling

        rows = measure_sampling(config, batch=args.batch_size or BATCH, compilers=compilers(args), checkout=checkout, **both)
    elif args.suite == "optimizer":
        from nvae_fast.benchmarks.optimizer import measure_optimizer

        rows = measure_optimizer(copy_rate=copy_rate, **both)
    else:
        table = memory.table
        budget = None if args.budget is None else size(args.budget)
        rows = memory.measure_memory(config, device=device, budget=budget, checkout=checkout)
    print(*table(rows), sep="\n", flush=True)
    return rows


def check_numbers(args: argparse.Namespace, device: torch.device) -> None:
    """The suite `check`: no times; RunError where a number is wrong or a second run has other bits."""
    from nvae_fast.benchmarks import report, verify

    cases = [case for case in verify.cases(device) if (args.case or "") in case.name]
    steps = (args.case or "") in verify.STEP
    if not cases and not steps:
        raise InputError(f"no case of suite 'check' has '{args.case}' in its name: try the name of an op")
    rows = [row for case in cases for row in verify.verify(case, device)] + (list(verify.verify_steps(device)) if steps else [])
    write_json(args.json, report.document(rows, device))
    wrong = [row for row in rows if not (row["check"]["ok"] and row["same_bits"])]
    print(*map(verify.line, wrong), sep="\n", end="\n" if wrong else "")
    ops = ", ".join(sorted({f"{row['op']} ({row['impl'].removeprefix('ours:')})" for row in rows}))
    print(f"{len(rows)} checks of {ops or 'nothing: no implementation but the reference runs here'}")
    missing = {case.op for case in cases} - {row["op"] for row in rows}
    if missing and device.type == "cuda":
        raise RunError(f"no implementation but the reference runs on {device} of: {', '.join(sorted(missing))}")
    if wrong:
        raise RunError(f"{len(wrong)} of {len(rows)} checks failed")


def write_json(path: str | None, document: dict) -> None:
    if path:
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        atomic_write(path, lambda file: file.write(text.encode()))


def set_threads(threads: int) -> None:
    import torch

    if threads < 1:
        raise InputError(f"--threads={threads} must be at least 1")
    torch.set_num_threads(threads)


def check_writable(path: Path) -> None:
    """InputError now rather than after the measurements."""
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
