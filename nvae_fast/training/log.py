"""What a run reports: metrics.jsonl, TensorBoard when installed, and the progress bar."""

from __future__ import annotations

import importlib
import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nvae_fast.checkpoint.files import atomic_write, writing
from nvae_fast.checkpoint.native import finite


def peak_memory(device: torch.device) -> int:
    """Peak bytes of this process: of tensors on a GPU, else of the whole process in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RunLog:
    """Lines of metrics.jsonl (one JSON object each, with its `step`), TensorBoard scalars and images, a progress bar."""

    def __init__(self, folder: Path, *, total_images: int, done_images: int, step: int, epoch: int, bar: bool) -> None:
        self.path = folder / "metrics.jsonl"
        self._cut(step, epoch)
        with writing(self.path):
            self._file = open(self.path, "a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", step)
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._bar = tqdm(total=total_images, initial=done_images, unit="img", unit_scale=True, disable=not bar,
                         dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10.0)  # fmt: skip

    def _cut(self, step: int, epoch: int) -> None:
        """Drop what a run that resumes after `step`, in `epoch`, will write again, and a line that a kill left unfinished."""
        if not self.path.exists():
            return
        kept = []
        with writing(self.path):
            content = self.path.read_text(encoding="utf-8", errors="replace")
        for line in content.splitlines():
            try:
                values = json.loads(line)
                if values["step"] <= step and not (values["event"] == "valid" and values["epoch"] >= epoch):
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        atomic_write(self.path, lambda file: file.write("".join(f"{line}\n" for line in kept).encode()))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread need not show the traceback of a full disk: the next write raises the same error."""
        if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
            self._hook(failure)

    def write(self, **values: Any) -> None:
        """One line of metrics.jsonl (null for what is not finite); numbers also go to TensorBoard."""
        with writing(self.path):
            self._file.write(json.dumps(finite(values), allow_nan=False) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    if isinstance(value, (int, float)) and name != "step":
                        self._board.add_scalar(f"{values['event']}/{name}", value, values["step"])

    def picture(self, name: str, grid: Tensor, step: int) -> None:
        """An image [C, H, W] for TensorBoard."""
        if self._board is not None:
            with writing(self.path):
                self._board.add_image(name, grid, step)

    def advance(self, images: int, **shown: str) -> None:
        """Move the bar by a batch; `shown` replaces what stands behind it."""
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(images)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        with writing(self.path):  # both flush what a full disk has not taken yet
            try:
                self._file.close()
                if self._board is not None:
                    self._board.close()
            finally:
                threading.excepthook = self._hook


class NoLog:
    """What the processes write that are not the first one: nothing."""

    def write(self, **values: Any) -> None: ...

    def advance(self, images: int, **shown: str) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def _tensorboard(folder: Path, step: int):
    try:
        module = importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        return None
    with writing(folder):
        return module.SummaryWriter(str(folder), purge_step=step + 1)
