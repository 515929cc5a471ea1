"""What nvcc makes of the kernels for sm_80 and sm_90: no spills, registers for the blocks that should fit, 16-byte accesses,
and issue slots per output, which are what these kernels are bound by."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import sass
from emulated import ROOT, SOURCES
from torch.utils import cpp_extension

UNITS = [("bf16", 90), ("f32", 90), ("bf16", 80)]


class Row(NamedTuple):
    registers: int  # at most, on either architecture
    trips: list[float]  # of the loops inside the loop over tiles, for one warp and a whole tile; 0: not on the usual path
    outputs: int  # of a lane and tile
    slots: float  # issue slots per output, at most, on sm_90
    wide: int  # 16-byte loads: those of a staged row


MAIN = {  # bfloat16, with Swish
    "tensor_forward": Row(128, [20 / 8, 0, 0], 64, 31, 5),
    "tensor_backward": Row(128, [16 / 8, 20 / 8, 0, 0, 0], 64, 52, 19),
    "core_forward Li5ELi16E": Row(168, [20 / 4], 128, 52, 5),
    "core_forward Li5ELi8E": Row(168, [12 / 4], 32, 68, 3),
    "core_forward Li3ELi16E": Row(168, [18 / 4], 128, 34, 5),
    "core_backward Li5ELi16E": Row(168, [20 / 4, 0, 8], 128, 103, 15),
    "core_backward Li5ELi8E": Row(168, [12 / 4, 0, 2], 32, 115, 9),
    "core_backward Li3ELi16E": Row(168, [18 / 4, 0, 8], 128, 62, 15),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> dict[tuple[str, int], dict[str, sass.Kernel]]:
    """(storage, architecture) -> kernels"""
    if sass.tool("nvcc") is None:
        pytest.skip("nvcc was not found")
    folder = tmp_path_factory.mktemp("cubins")

    def one(unit: tuple[str, int]) -> dict[str, sass.Kernel]:
        source = SOURCES / f"depthwise_cuda_{unit[0]}.cu"
        return sass.compiled(source, ROOT / "csrc", unit[1], folder, "-O3", *cpp_extension.COMMON_NVCC_FLAGS)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(UNITS, pool.map(one, UNITS), strict=True))


def named(kernels: dict[str, sass.Kernel], name: str) -> sass.Kernel:
    (found,) = (k for mangled, k in kernels.items() if re.search(name.replace(" ", r"I.*"), mangled))
    return found


def test_nothing_spills_and_blocks_fit(kernels):
    for unit, found in kernels.items():
        assert len(found) == (14 if unit[0] == "bf16" else 10), sorted(found)
        spilled = {name: k.local for name, k in found.items() if k.local}
        assert not spilled, (unit, spilled)
    for name, row in MAIN.items():
        for arch in (80, 90):
            assert named(kernels["bf16", arch], name).registers <= row.registers, (name, arch)


def test_tensors_are_read_16_bytes_at_a_time(kernels):
    for unit, found in kernels.items():
        if not any(k.code for k in found.values()):
            pytest.skip("nvdisasm was not found")
        for name, row in MAIN.items():
            if unit[0] == "bf16" or not name.startswith("tensor"):
                count = named(found, name).opcodes()
                assert count["LDG.128"] >= row.wide, (unit, name, count)
        if unit[0] == "bf16":
            for kernel, multiplications in (("tensor_forward", 240), ("tensor_backward", 240 + 208)):
                count = named(found, kernel).opcodes()
                assert count["STG.128"] == 8 and count["HMMA"] == multiplications, count


def test_issue_slots_per_output(kernels):
    for name, row in MAIN.items():
        kernel = named(kernels["bf16", 90], name)
        if not kernel.code:
            pytest.skip("nvdisasm was not found")
        tiles = max(sass.loops(kernel, 0, len(kernel.code) - 1), key=lambda loop: loop[1] - loop[0])
        slots = sass.slots(kernel, *tiles, list(row.trips)) / row.outputs
        print(f"{name:26s} {kernel.registers} registers, {slots:.1f} issue slots per output")
        assert slots <= row.slots, (name, slots)
