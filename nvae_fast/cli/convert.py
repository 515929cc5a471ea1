"""Convert a checkpoint: an official checkpoint.pt into a folder of ours, or a folder into an official file.

The direction follows from the source. Optimiser moments of a training checkpoint go into the official file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from nvae_fast.errors import InputError

NAME = "convert"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="official checkpoint.pt, or a run or checkpoint folder")
    parser.add_argument("target", help="folder to create, or .pt file to write")


def run(args: argparse.Namespace) -> None:
    import nvae_fast
    from nvae_fast.checkpoint.native import load_model, resolve_checkpoint
    from nvae_fast.training.state import load_optimizer

    source, target = Path(args.source), Path(args.target)
    if source.is_file():
        if target.suffix in (".pt", ".pth") or target.is_file():
            raise InputError(f"'{source}' is an official file already: give a folder as the target, not '{target}'")
        if (target / "checkpoints").exists():
            raise InputError(f"'{target}' holds a run: give another folder as the target")
        model = nvae_fast.load_nvlabs_checkpoint(source)
        model.save_pretrained(target)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters: {target}")
        return
    folder = resolve_checkpoint(source)
    if target.is_dir():
        raise InputError(f"'{target}' is a folder: give the path of the .pt file to write")
    model = load_model(folder)
    optimizer, progress = load_optimizer(folder, model)
    nvae_fast.save_nvlabs_checkpoint(model, target, optimizer=optimizer, epoch=progress.epoch, global_step=progress.step)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters: {target}")
