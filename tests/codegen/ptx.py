"""What the tests of generated code count in PTX."""

from __future__ import annotations

import re


def joins(ptx: str) -> list[dict[str, bool]]:
    """Of each ticket that the kernel draws: whether all threads have stored before, whether it is ordered with what every other
    multiprocessor does, and whether what is read behind it first, the parts, is read past the first-level cache."""
    found = []
    before, *behind = re.split(r"(?=@\S+ atom\.global[\w.]*\.add)", ptx)
    for text in behind:
        found.append({
            "stored": "bar.sync" in re.split(r"st\.global", before)[-1],
            "ordered": "atom.global.gpu.acq_rel.add" in text.split("\n")[0],
            "past": "ld.global.cg" in text,
            "fresh": re.search(r"ld\.global\S*", text)[0].startswith("ld.global.cg."),
        })  # fmt: skip
        before = text
    return found


def widths(ptx: str, access: str) -> dict[str, int]:
    """Bits of an access to global memory -> how many there are (of loads, also those straight into shared memory)."""
    found: dict[str, int] = {}
    if access == "ld":
        for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+),", ptx):
            found[str(8 * int(size, 0))] = found.get(str(8 * int(size, 0)), 0) + 1
    for vector, bits in re.findall(rf"{access}\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx):
        width = str(int(vector or 1) * int(bits))
        found[width] = found.get(width, 0) + 1
    return found
