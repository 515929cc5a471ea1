"""What nvcc makes of the kernels, without a GPU: registers, spills, and issue slots along a path through the machine code."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple


def tool(name: str) -> str | None:
    """A CUDA program: on PATH, in CUDA_HOME, or in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    places = [Path(spec.origin).parent / "backends" / "nvidia" / "bin"] if spec else []
    if home := os.environ.get("CUDA_HOME"):
        places.insert(0, Path(home) / "bin")
    return shutil.which(name) or next((str(p / name) for p in places if (p / name).exists()), None)


class Kernel(NamedTuple):
    registers: int
    local: int  # bytes of stack and spills
    code: list[str]  # instructions, in their order
    targets: dict[int, int]  # of branches, both as positions in `code`

    def opcodes(self) -> Counter:
        """Opcodes as far as the width: LDG.128, STG.128, HMMA, ..."""
        return Counter(map(opcode, self.code))


def opcode(line: str) -> str:
    parts = re.sub(r"^@!?U?P\w+\s+", "", line).split()[0].split(".")
    return ".".join([parts[0], *(p for p in parts[1:] if p in ("64", "128", "TANH", "EX2", "RCP"))])


def compiled(source: Path, include: Path, arch: int, folder: Path, *flags: str) -> dict[str, Kernel]:
    """Kernels of a .cu by their mangled names; raises CalledProcessError. No code where there is no nvdisasm."""
    cubin = folder / f"{source.stem}_{arch}.cubin"
    command = [tool("nvcc"), "-std=c++20", f"-arch=sm_{arch}", *flags, f"-I{include}", "-Xptxas", "-v", "-cubin", str(source)]
    said = subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True, text=True).stderr
    assert "warning" not in said.lower(), said
    found = {}
    for name, stack, stores, loads, registers in re.findall(
        r"Function properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        said,
    ):
        found[name] = Kernel(int(registers), int(stack) + int(stores) + int(loads), [], {})
    if disassembler := tool("nvdisasm"):
        text = subprocess.run([disassembler, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
        for section in re.split(r"\n\s*\.section\s+", text):
            if match := re.match(r"\.text\.(\w+)", section):
                _read(section, found[match[1]])
    return found


def _read(section: str, kernel: Kernel) -> None:
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if match := re.match(r"\s*(\.L_x_\d+):", line):
            labels[match[1]] = len(kernel.code)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,6}\*/\s+(.*?)\s*;", line):
            kernel.code.append(match[1])
    for i, line in enumerate(kernel.code):
        if (match := re.search(r"`\((\.L_x_\d+)\)", line)) and re.search(r"\bBRA\b", line):
            kernel.targets[i] = labels[match[1]]


def loops(kernel: Kernel, low: int, high: int) -> list[tuple[int, int]]:
    """The outermost loops within [low, high], as (first, last) instruction."""
    spans: dict[int, int] = {}
    for i, target in kernel.targets.items():
        if low <= target <= i <= high and (target, i) != (low, high):
            spans[target] = max(spans.get(target, 0), i)
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans.items()):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], last)
        elif (first, last) != (low, high):
            found.append((first, last))
    return found


BUSY = ("MUFU.TANH", "MUFU.RCP", "HMMA", "LDG.128", "STG", "STG.128")


def slots(kernel: Kernel, low: int, high: int, trips: list[float]) -> float:
    """Instructions issued from `low` to `high` on the path that does most (activations, loads, stores), of several on the
    shortest. Loops inside run `trips` times, which are used up from the left."""
    inner = {first: last for first, last in loops(kernel, low, high)}
    best: dict[int, tuple[float, float]] = {low: (0.0, 0.0)}  # position -> (-busy, instructions)
    costs = {}
    for first, last in inner.items():
        costs[first] = trips.pop(0) * slots(kernel, first, last, trips)

    def offer(at: int, value: tuple[float, float]) -> None:
        if at not in best or value < best[at]:
            best[at] = value

    for i in range(low, high + 1):
        if i not in best:
            continue
        busy, count = best[i]
        if i in inner:
            busy -= sum(opcode(line) in BUSY for line in kernel.code[i : inner[i] + 1])
            offer(inner[i] + 1, (busy, count + costs[i]))
            continue
        line = kernel.code[i]
        if i == high:
            return count + 1
        value = (busy - (opcode(line) in BUSY), count + 1)
        target = kernel.targets.get(i)
        if target is not None and target > i:
            offer(min(target, high), value)
        if target is None and not re.match(r"(BRA|EXIT|RET)\b", line) or line.startswith("@"):
            offer(i + 1, value)
    raise AssertionError("no path")
