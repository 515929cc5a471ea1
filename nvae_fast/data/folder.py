"""Image files in a folder or in a zip or tar archive.

Which files: those ending in IMAGE_SUFFIXES, at any depth (the names of sub-folders, such as classes, mean nothing), in the
order of their names. Hidden files and the thumbnails that systems leave behind are passed over; any other file is an error
that names it. Sub-folders `train` and one of `valid`, `validation`, `val`, `test` are the two splits (what lies beside them is
then not looked at); CelebA's `list_eval_partition.txt` is obeyed (0 trains, 1 validates, the rest is left out); otherwise a
seeded permutation is cut. Which pixels: see decode.py.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from PIL import Image

from ..errors import InputError
from .base import ImageSource, LazySource, Request, find_pair, keep_small, one_line, parallel, read_up_to, split_indices
from .corrupt import Corrupt, CorruptImage
from .decode import IMAGE_SUFFIXES, decode, head, read_file
from .tar import TarArchive
from .transforms import size_text

_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")
_PARTITION = "list_eval_partition.txt"
_MAX_PARTITION = 64 * 2**20  # bytes: CelebA's has 5 MB


class Folder:
    """The files below a folder, as relative names with '/'."""

    def __init__(self, path: Path):
        self.path = path
        self.names: list[str] = []
        seen = {path.resolve()}

        def fail(error: OSError) -> None:  # os.walk passes over unreadable folders in silence
            raise error

        for root, folders, files in os.walk(path, onerror=fail, followlinks=True):
            kept = []
            for name in folders:
                real = Path(root, name).resolve()
                if real not in seen and not _ignored(name):  # a link to a folder above would never end
                    seen.add(real)
                    kept.append(name)
            folders[:] = kept
            inner = Path(root).relative_to(path).as_posix()
            self.names += files if inner == "." else [f"{inner}/{name}" for name in files]

    def label(self, name: str) -> str:
        return str(self.path / name)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


class Archive:
    """The files of a zip archive; members are streamed, never extracted."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
            self.names = [info.filename for info in self._zip.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:  # what zipfile raises on bad archives
            raise InputError(f"{path} is not a readable zip archive: {one_line(error)}") from None

    def label(self, name: str) -> str:
        return f"{self.path}:{name}"

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self._zip.open(name))


def read_folder(request: Request) -> ImageSource:
    """The images of a folder."""
    if not request.path.is_dir():
        raise InputError(f"{request.path} is a file, expected a folder of images (or a .zip, .npy or .npz file)")
    return _read(request, Folder(request.path))


def read_zip(request: Request) -> ImageSource:
    """The images of a zip archive."""
    return _read(request, Archive(request.path))


def read_tar(request: Request) -> ImageSource:
    """The images of an uncompressed tar archive; its other files are passed over."""
    return _read(request, TarArchive(request.path))


def _read(request: Request, files: Folder | Archive | TarArchive) -> ImageSource:
    every, chosen = _select(request, files)
    corrupt = Corrupt(request.max_corrupt)
    with warnings.catch_warnings():
        # Pillow warns above its pixel limit; decode.py refuses
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        size, channels = _shape(request, files, every, corrupt)
        chosen = [name for name in chosen if files.label(name) not in corrupt]
        if not chosen:
            raise InputError(f"{files.path}: none of the images of the {request.split} part can be read")

        source = LazySource(
            request.name,
            len(chosen),
            (*size, channels),
            lambda i: decode(partial(files.open, chosen[i]), files.label(chosen[i]), channels),
            lambda i: files.label(chosen[i]),
            request.transform,
            corrupt,
            lambda i: read_file(partial(files.open, chosen[i]), files.label(chosen[i])),
        )
        return keep_small(source) if request.keep_small else source


def _shape(
    request: Request, files: Folder | Archive | TarArchive, names: Sequence[str], corrupt: Corrupt
) -> tuple[tuple[int, int], int]:
    """((height, width), channels) of a set; reads no more headers than are needed to know them."""

    def look(name: str) -> tuple[bool, tuple[int, int]] | None:
        try:
            return head(partial(files.open, name), files.label(name))
        except CorruptImage as error:
            corrupt.add(files.label(name), error)
            return None

    size, channels = request.transform.size, request.channels
    if size is not None and channels is not None:
        return size, channels
    heads: dict[str, tuple[bool, tuple[int, int]]] = {}
    for start in range(0, len(names), 1024):
        some = names[start : start + 1024]
        found = parallel(look, some)
        heads |= {name: h for name, h in zip(some, found, strict=True) if h is not None}
        if size is not None and not all(grey for grey, _ in heads.values()):
            break  # one colour image makes the set coloured, and the size is given
    if not heads:
        raise InputError(f"{files.path}: none of the {len(names)} images can be read")
    if size is None:
        size, _ = Counter(shape for _, shape in heads.values()).most_common(1)[0]
        odd = next((name for name, (_, shape) in heads.items() if shape != size), None)
        if odd is not None:
            raise InputError(
                f"{files.label(odd)} is {size_text(heads[odd][1])}, expected {size_text(size)} (height x width) "
                f"like most of the others: use --image-size to bring all to one size"
            )
    return size, channels or (1 if all(grey for grey, _ in heads.values()) else 3)


def _ignored(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _IGNORED for part in name.split("/"))


def _select(request: Request, files: Folder | Archive | TarArchive) -> tuple[list[str], list[str]]:
    """Names of the images of both splits (they must agree in size and channels), and of the split that is asked for."""
    names = sorted(name for name in files.names if not _ignored(name))
    pair = _partition(files, names) or split_names(names)
    if pair is not None:
        names = pair[0] + pair[1]
    foreign = [name for name in names if not name.lower().endswith(IMAGE_SUFFIXES)]
    if foreign:
        more = f" (and {len(foreign) - 1} more such files)" if len(foreign) > 1 else ""
        raise InputError(
            f"{files.label(foreign[0])} is not an image{more}: take it out, only images may lie there "
            f"({', '.join(s[1:] for s in IMAGE_SUFFIXES)})"
        )
    if not names:
        raise InputError(f"no images in {files.path}: expected files named *{', *'.join(IMAGE_SUFFIXES)}")
    if pair is not None:
        return names, pair[0 if request.split == "train" else 1]
    return names, [names[i] for i in split_indices(request, len(names))]


def split_names(names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The files below a folder `train` and below one of `valid` or the like, if both are there."""
    parts = [name.split("/") for name in names]
    depth = 0  # folders that wrap everything, as archives often have
    while parts and all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    groups: dict[str, list[str]] = {}
    for name, p in zip(names, parts, strict=True):
        if len(p) > depth + 1:
            groups.setdefault(p[depth].lower(), []).append(name)
    pair = find_pair(groups)
    return None if pair is None else (groups[pair[0]], groups[pair[1]])


def _partition(files: Folder | Archive | TarArchive, names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """The two splits of CelebA's list, lines of `000001.jpg 0`."""
    listed = next((name for name in names if name.split("/")[-1] == _PARTITION), None)
    if listed is None:
        return None
    with files.open(listed) as stream:
        words = [line.split() for line in read_up_to(stream, _MAX_PARTITION).decode("ascii", "replace").splitlines()]
    split = {w[0]: w[1] for w in words if len(w) == 2}
    images = [name for name in names if name != listed]
    missing = next((name for name in images if name.split("/")[-1] not in split), None)
    if missing is not None:
        raise InputError(f"{files.label(listed)} does not list {missing}: take one of the two out")
    train, valid = ([name for name in images if split[name.split("/")[-1]] == which] for which in "01")
    if not train or not valid:
        raise InputError(f"{files.label(listed)} leaves {len(train)} images to train and {len(valid)} to validate")
    return train, valid
