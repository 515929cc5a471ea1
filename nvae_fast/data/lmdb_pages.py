"""Whether the pages of an LMDB hang together: the library follows what a damaged page says, and the process dies with it.

Layout (LMDB 0.9, native byte order): pages 0 and 1 are metas, the one of the later transaction counts. A page begins with its
number (8 bytes), 2 unused, flags (2), lower and upper bound of its free space (2 each); then come the places of its nodes, 2
each. A node: 4 + 2 + 2 bytes, then its key. In a branch the first 6 are the page of a child; in a leaf the first 4 are the
size of the value, then flags; the value follows the key, or, where it is big, the number of the page that it begins on.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

MAGIC, BRANCH, LEAF, BIG, DUPLICATES = 0xBEEFC0DE, 1, 2, 1, 4
HEADER, META, NODE = 16, 152, 8  # bytes: of a page, of a meta page with its header, of a node
DEEPEST, AT_ONCE = 32, 4096  # levels that the library can follow, pages of a step of ours


def fault(path: Path) -> str | None:
    """What is wrong with the tree of pages of the LMDB file at `path`, in a few words; None for one that can be read, or that
    is cut off or of another kind, which the library says by itself.

    Reads branches and leaves but no big values: an image of 12 KB takes 30 bytes of them.
    """
    if path.stat().st_size < META:
        return None
    data = np.memmap(path, np.uint8, "r")

    def number(at: np.ndarray | int, size: int) -> np.ndarray:
        """The little-endian integers of `size` bytes at these places."""
        at = np.asarray(at, np.int64)
        return sum(data[at + i].astype(np.int64) << 8 * i for i in range(size))

    size = int(number(40, 4))
    if number(16, 4) != MAGIC:
        return None
    if not 256 <= size <= 65536 or size & (size - 1):
        return f"pages of {size} bytes"
    if len(data) < size + META:
        return None
    if number(size + 16, 4) != MAGIC or number(size + 40, 4) != size:
        return "its two heads differ"
    meta = 16 + (size if number(size + 144, 8) > number(144, 8) else 0)
    flags, depth, root, last = (int(number(meta + at, n)) for at, n in ((76, 2), (78, 2), (112, 8), (120, 8)))
    if last < 1 or (last + 1) * size > len(data):
        return None if last >= 1 else f"{last + 1} pages in use"
    if depth > DEEPEST or flags & DUPLICATES:
        return f"{depth} levels with flags {flags}"
    pages, seen = np.array([root] if depth else [], np.int64), 0
    for level in range(depth):
        kind, children = (LEAF if level == depth - 1 else BRANCH), []
        seen += len(pages)
        if seen > last or pages.min() < 2 or pages.max() > last:
            return f"level {level} leads to pages that are not there"
        for numbers in np.array_split(pages, -(-len(pages) // AT_ONCE)):
            base = numbers * size
            lower, upper = number(base + 12, 2), number(base + 14, 2)
            fits = (number(base, 8) == numbers) & (number(base + 10, 2) == kind)
            fits &= (lower >= HEADER + 2) & (lower % 2 == 0) & (lower <= upper) & (upper <= size)
            if not fits.all():
                return f"page {numbers[~fits][0]} has a wrong head"
            count = (lower - HEADER) // 2
            owner, free, page = (np.repeat(a, count) for a in (base, upper, numbers))
            nth = np.arange(len(owner)) - np.repeat(count.cumsum() - count, count)
            place = number(owner + HEADER + 2 * nth, 2)
            fits = (place >= free) & (place + NODE <= size)
            node = owner + np.where(fits, place, 0)
            value, marks, end = number(node, 4), number(node + 4, 2), place + NODE + number(node + 6, 2)
            if kind == BRANCH:
                fits &= end <= size
                children.append(value | marks << 32)
            else:
                big = marks & BIG > 0
                fits &= (end + np.where(big, 8, value) <= size) & (marks & DUPLICATES == 0)
                first = number(owner + np.where(fits & big, end, 0), 8)
                there = (first >= 2) & (first <= last) & ((last + 1 - first) * size >= HEADER + value)
                fits &= ~big | there
            if not fits.all():
                return f"page {page[~fits][0]} has a wrong node"
        pages = np.concatenate(children) if children else pages
    return None
