"""What runs here: versions, devices, the native extension, and which implementation each op would take and why.

`python -m nvae_fast.env` and `nvae-fast env` print it; `environment()` returns the same facts as a dict.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

import nvae_fast.functional  # noqa: F401  every op registers itself when imported
from nvae_fast._version import __version__
from nvae_fast.kernels import _auto, _impl

PACKAGES = ("torch", "numpy", "triton")
RULES = {"cpu": _auto.CPU, "triton": _auto.TRITON, "cuda": _auto.CUDA}


def environment() -> dict[str, Any]:
    """Keys `versions`, `devices`, `threads`, `extension`, and `ops`: rows of device, dtype, op, auto (the implementation that
    impl="auto" takes for such tensors) and `not` (the others, each with the reason)."""
    module, reason = _impl.load_native()
    extension = {"loaded": module is not None, "reason": reason}
    if module is not None:
        extension |= module.build_info() | {"uses": module.instruction_set()}
    devices = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        devices |= {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    kinds = dict.fromkeys(name.split(":")[0] for name in devices)
    return {
        "versions": {"nvae_fast": __version__, "python": platform.python_version()} | _versions(),
        "devices": devices,
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "extension": extension,
        "ops": [
            {"device": kind, "dtype": str(dtype).removeprefix("torch."), **row}
            for kind in kinds
            for dtype in (torch.float32, torch.bfloat16)
            for row in _impl.table(kind, dtype)
        ],
    }


def main() -> None:
    """Prints `environment()`, one fact a line."""
    facts = environment()
    print("versions    " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    for name, what in facts["devices"].items():
        print(f"device      {name}: {what}")
    print(f"threads     {facts['threads']['torch']} of {facts['threads']['cores']} cores")
    extension = facts["extension"]
    if extension["loaded"]:
        sets, cuda = ", ".join(extension["instruction_sets"]), "with" if extension["cuda"] else "without"
        print(f"extension   built by {extension['compiler']} for torch {extension['torch']}, {cuda} CUDA")
        print(f"            instruction sets {sets}; uses {extension['uses']}")
    else:
        print(f"extension   none: {extension['reason']}")
    for row in facts["ops"]:
        reasons = "; ".join(f"not {name}: {why}" for name, why in row["not"].items())
        rule = RULES.get(row["auto"], {}).get(row["op"])
        print(f"{row['device']} {row['dtype']:9s} {row['op']:26s} {row['auto']:10s} {rule.why if rule else reasons}".rstrip())


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


if __name__ == "__main__":
    main()
