"""`prepare`: LMDBs in the reference's layout from whatever `open_images` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..errors import InputError, unknown
from .base import ImageSource, parallel
from .lmdb_store import DESCRIPTION, STORES, write_lmdb
from .sources import DATASETS, MAX_CORRUPT, open_images

_CHUNK = 256  # images decoded, then written in one transaction


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    dataset: str | None = None,
    read: str | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    valid_fraction: float = 0.1,
    max_corrupt: int = MAX_CORRUPT,
    bar: bool = False,
) -> dict[str, int]:
    """Write a training and a validation LMDB into a new folder; the number of images in each.

    The folder comes into being at the end, whole, by one renaming: an interrupted `prepare` leaves at most `OUT.partial`,
    which nothing reads and the next `prepare` removes. Without `dataset` the values are raw uint8 [H,W,C] of any shape, to be
    read as `--data OUT`. With one, they are what the public code reads for it (`--dataset` may still be left out here): raw
    RGB, or for CelebA-64 and LSUN the files of the images, unchanged.

    Args:
        source: what `open_images` takes.
        dataset: a name of DATASETS with LMDBs. read: how to read the source; None: guessed.
        image_size: (H, W) in pixels, for other images than those of a `dataset`; None: as they are.
        seed, valid_fraction: the split of a source that has none. max_corrupt: as in `open_images`, for each split.

    Raises:
        InputError: `out` exists and is not an empty folder; what `open_images` raises; a full disk.
    """
    out = Path(out).expanduser()
    entry = DATASETS.get(dataset) if dataset else None
    if dataset and (entry is None or entry.stores is None):
        raise unknown("dataset with LMDBs", dataset, [name for name, e in DATASETS.items() if e.stores])
    if entry and image_size:
        raise InputError(f"dataset {dataset} has images of {entry.side}x{entry.side}: leave out --dataset or --image-size")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists: choose a new folder, or remove it")
    options = {"image_size": image_size, "seed": seed, "valid_fraction": valid_fraction, "max_corrupt": max_corrupt}
    sources = {
        split: open_images(source, split=split, dataset=dataset, read=read, keep_small=False, **options)
        for split in ("train", "valid")
    }
    first = sources["train"]
    shape = (first.height, first.width, first.channels)
    if entry and shape != (entry.side, entry.side, 3):
        raise InputError(
            f"'{first.name}' has images of {'x'.join(map(str, shape))}, {dataset} takes {entry.side}x{entry.side}x3"
        )
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        stores = entry.stores if entry and entry.stores else STORES
        counts = {
            split: write_lmdb(partial / store, _values(sources[split], entry is not None and entry.encoded, split, bar))
            for store, split in zip(stores, sources, strict=True)
        }
        if not all(counts.values()):
            raise InputError(f"{source}: none of the images of a split can be read")
        about = {"dataset": dataset or "lmdb", **dict(zip(("height", "width", "channels"), shape, strict=True)), **counts}
        about |= {"seed": seed, "valid_fraction": valid_fraction}
        with open(partial / DESCRIPTION, "w", encoding="utf-8") as file:
            file.write(json.dumps(about, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}") from None
    finally:  # also on Ctrl-C
        shutil.rmtree(partial, ignore_errors=True)
    return counts


def _values(source: ImageSource, encoded: bool, split: str, bar: bool) -> Iterator[list[bytes]]:
    """The values of a split in chunks, without images that cannot be read."""
    if encoded and getattr(source, "stored", None) is None:
        raise InputError(f"'{source.name}' has no image files, which this dataset keeps: use a folder or archive of them")

    def one(i: int) -> bytes | None:
        image = source.readable(i)
        if image is None:
            return None
        return source.stored(i) if encoded else np.ascontiguousarray(image).tobytes()

    try:
        total = len(source)
    except InputError:  # shards behind a URL may not say how many images they have
        total = None
    with tqdm(total=total, desc=split, unit="img", disable=not bar) as progress:
        for some in source.chunks(_CHUNK):
            yield [value for value in parallel(one, some, 16) if value is not None]
            progress.update(len(some))
