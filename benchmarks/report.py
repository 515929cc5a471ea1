"""What a run of the benchmarks says: facts of the machine, the JSON document, the table."""

from __future__ import annotations

import datetime
import platform
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

SCHEMA = "nvae_fast.bench/1"
RATES = ("step", "sampling")  # suites whose tables show images a second
COPY_BYTES = 2**28  # many times what a cache holds


ROOF = {"cpu": (torch.float32, (16, 128, 32, 32)), "cuda": (torch.bfloat16, (64, 512, 64, 64))}
"""A 3x3 convolution that is bound by arithmetic, by kind of device: its type and its images."""


def document(rows: list[Row], device: torch.device, rates: dict[str, float] | None = None) -> dict[str, Any]:
    """The whole run as JSON holds it. What does not apply is None, such as `commit` and `dirty` outside a git checkout.

    A row's `impl` is ours:<implementation>, eager, eager_channels_last, compile or max_autotune, another form by its name
    (eager_loop, adam_fused, around_cudnn), a step replayed as one CUDA graph (ours:graph, eager_graph), or nvlabs, the
    published code. Rows of the suite memory also have per_image_bytes, largest_batch,
    budget_bytes and traced; their `check` is None where no numbers were computed.
    `bytes` is what the op has to move, `copy_share` how near that comes to a copy (above 1 where caches hold it). `launches`
    counts the kernels of a GPU, `busy_share` is for how much of the time it has one. `rates` are those of `rates`.
    """
    return {"schema": SCHEMA, **facts(device), "rates": rates, "rows": rows}


def facts(device: torch.device) -> dict[str, Any]:
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "threads": torch.get_num_threads(),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes here: the median of seven."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(8):
        sync()
        start = time.perf_counter()
        target.copy_(source)
        sync()
        seconds.append(time.perf_counter() - start)
    return 2 * COPY_BYTES / sorted(seconds[1:])[3]


def product_rate(device: torch.device) -> float:
    """Operations a second, two for a multiply-add, of torch's own dense 3x3 convolution here: the best of five."""
    dtype, shape = ROOF[device.type]
    x = torch.ones(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.ones(shape[1], shape[1], 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(6):
        sync()
        start = time.perf_counter()
        y = torch.nn.functional.conv2d(x, w, padding=1)
        sync()
        seconds.append(time.perf_counter() - start)
    return 2 * y.numel() * w[0].numel() / min(seconds[1:])


def rates(device: torch.device) -> dict[str, float]:
    """What a device can do at most: bytes copied, and operations of products, a second."""
    return {"copy": copy_rate(device), "products": product_rate(device)}


def ratios(rows: list[Row]) -> dict[tuple[str, str], float]:
    """How many times as long as ours each other row of a case takes, by (phase, impl); ours is the first row of a phase. Only
    where the numbers of both are right."""
    found = {}
    for phase in dict.fromkeys(row["phase"] for row in rows):
        ours, *others = (row for row in rows if row["phase"] == phase)
        for row in others:
            if ours["check"]["ok"] and row["check"]["ok"]:
                found[phase, row["impl"]] = row["median_ms"] / ours["median_ms"]
    return found


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of one case."""
    yield f"{rows[0]['case']}  (ours: {rows[0]['layout'].replace('_', '-')})"
    ratio, phase = ratios(rows), None
    for row in rows:
        cells = [
            f"{'' if row['phase'] == phase else row['phase']:8s}",
            f"{row['impl']:20s}",
            f"{row['median_ms']:9.3f} ({row['min_ms']:.3f}) ms".ljust(25),
            f"{ratio[row['phase'], row['impl']]:6.2f}x" if (row["phase"], row["impl"]) in ratio else " " * 7,
            " " * 14 if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:10.2f} MiB",
            "" if row["suite"] not in RATES else f"{row['images_per_s']:9.1f} images/s",
            " " * 6 if row["copy_share"] is None else f"{row['copy_share']:6.0%}",
            "" if row["launches"] is None else f"{row['launches']} launches, busy {row['busy_share']:.0%}",
        ]
        yield "  " + "  ".join(cells).rstrip() + _complaint(row["check"])
        phase = row["phase"]


LEGEND = "median (best) ms; how many times as long as ours; peak of tensors alive; share of the copy rate that the bytes need"


def _complaint(check: dict[str, Any]) -> str:
    if check["ok"]:
        return ""
    error, budget = ("not finite" if check[key] is None else f"{check[key]:.1e}" for key in ("error", "budget"))
    return f"  NUMBERS: error {error}, budget {budget}: no ratio"


def _commit() -> tuple[str | None, bool | None]:
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed below somebody else's checkout, it is not known there
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
