"""Image files in a folder or in a zip archive.

Which files: those ending in IMAGE_SUFFIXES, at any depth, in the order of their names. Hidden files and the thumbnails
that systems leave behind are passed over; any other file is an error that names it. Sub-folders `train` and one of
`valid`, `validation`, `val`, `test` are the two splits (what lies beside them is then not looked at); otherwise a
seeded permutation is cut.

Which pixels: a set whose every image is grey (modes 1, L, LA and 16-bit grey, scaled to 8 bits) has one channel, any
other set three. Transparency is shown on white, EXIF orientation is obeyed, palettes are looked up, and of an animation
the first frame counts.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from ..errors import InputError
from .base import ImageSource, LazySource, Request, find_pair, keep_small, one_line, parallel, split_indices
from .transforms import size_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Pillow looks at the content, not at the name: without a list, a .png that is PostScript would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
_IGNORED = ("thumbs.db", "desktop.ini", "__macosx")


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
            self.names += [Path(root, name).relative_to(path).as_posix() for name in files]

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
        except zipfile.BadZipFile as error:
            raise InputError(f"{path} is not a readable zip archive: {one_line(error)}") from None
        self.names = [info.filename for info in self._zip.infolist() if not info.is_dir()]

    def label(self, name: str) -> str:
        return f"{self.path}:{name}"

    def open(self, name: str) -> BinaryIO:
        return self._zip.open(name)  # type: ignore[return-value]


def read_folder(request: Request) -> ImageSource:
    """The images of a folder."""
    if not request.path.is_dir():
        raise InputError(f"{request.path} is a file, expected a folder of images (or a .zip, .npy or .npz file)")
    return _read(request, Folder(request.path))


def read_zip(request: Request) -> ImageSource:
    """The images of a zip archive."""
    return _read(request, Archive(request.path))


def _read(request: Request, files: Folder | Archive) -> ImageSource:
    every, chosen = _select(request, files)
    with warnings.catch_warnings():
        # Pillow warns above its pixel limit and refuses only above twice the limit: here both are refused
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        heads = parallel(lambda name: _head(files, name), every)  # (is grey, (height, width))
    channels = request.channels or (1 if all(grey for grey, _ in heads) else 3)
    size = request.transform.size
    if size is None:
        size, _ = Counter(shape for _, shape in heads).most_common(1)[0]
        odd = next((i for i, (_, shape) in enumerate(heads) if shape != size), None)
        if odd is not None:
            raise InputError(
                f"{files.label(every[odd])} is {size_text(heads[odd][1])}, expected {size_text(size)} (height x width) "
                f"like most of the others: use --image-size to bring all to one size"
            )
    source = LazySource(
        request.name,
        len(chosen),
        (*size, channels),
        lambda i: decode(lambda: files.open(chosen[i]), files.label(chosen[i]), channels),
        lambda i: files.label(chosen[i]),
        request.transform,
    )
    return keep_small(source)


def _ignored(name: str) -> bool:
    return any(part.startswith(".") or part.lower() in _IGNORED for part in name.split("/"))


def _select(request: Request, files: Folder | Archive) -> tuple[list[str], list[str]]:
    """Names of the images of both splits (they must agree in size and channels), and of the split that is asked for."""
    names = sorted(name for name in files.names if not _ignored(name))
    parts = [name.split("/") for name in names]
    depth = 0  # folders that wrap everything, as archives often have
    while parts and all(len(p) > depth + 1 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1
    groups: dict[str, list[str]] = {}
    for name, p in zip(names, parts, strict=True):
        if len(p) > depth + 1:
            groups.setdefault(p[depth].lower(), []).append(name)
    pair = find_pair(groups)
    if pair is not None:
        names = groups[pair[0]] + groups[pair[1]]
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
        return names, groups[pair[0] if request.split == "train" else pair[1]]
    return names, [names[i] for i in split_indices(request, len(names))]


def _failed(label: str, error: Exception) -> InputError:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return InputError(f"{label} has over {Image.MAX_IMAGE_PIXELS} pixels (Pillow's limit): shrink it or take it out")
    if isinstance(error, Image.UnidentifiedImageError):
        return InputError(f"{label} is no image of a known kind ({', '.join(_FORMATS)}): replace it or take it out")
    return InputError(f"{label} cannot be decoded ({one_line(error)}): replace it or take it out")


def _head(files: Folder | Archive, name: str) -> tuple[bool, tuple[int, int]]:
    """Whether the image is grey, and (height, width) as it is to be shown; reads the header only."""
    try:
        with files.open(name) as stream, Image.open(stream, formats=_FORMATS) as image:
            # versions of Pillow differ in whether the size of a turned TIFF is the stored or the shown one
            stored = image.format == "TIFF"
            width, height = (image.tag_v2[256], image.tag_v2[257]) if stored else image.size  # type: ignore[attr-defined]
            # asked for the EXIF of a PNG without one in front, Pillow decodes all of it to look behind the pixels
            exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
            turned = exif.get(0x0112) in (5, 6, 7, 8)
            return image.mode in _GREY, (width, height) if turned else (height, width)
    except Exception as error:  # decoders raise whatever a damaged file leads them to
        raise _failed(files.label(name), error) from None


def decode(opened: Callable[[], BinaryIO], label: str, channels: int) -> np.ndarray:
    """uint8 [h,w,channels] (1 or 3) of an encoded image. Errors: an InputError that names `label`."""
    try:
        with opened() as stream, Image.open(stream, formats=_FORMATS) as image:
            image.load()
            shown = ImageOps.exif_transpose(image)
            if shown.mode.startswith("I"):
                shown = Image.fromarray(_eight_bits(np.asarray(shown)))
            elif shown.mode == "F":
                raise ValueError("floating-point pixels: save the images as one .npy file")
            elif shown.has_transparency_data:
                white = Image.new("RGBA", shown.size, "white")
                shown = Image.alpha_composite(white, shown.convert("RGBA"))
            pixels = np.asarray(shown.convert("L" if channels == 1 else "RGB"))
    except Exception as error:
        raise _failed(label, error) from None
    return pixels.reshape(*pixels.shape[:2], channels)


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """16-bit grey levels to the nearest of 256: 65535 = 257 * 255."""
    wide = pixels.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(f"grey levels from {wide.min()} to {wide.max()}, expected 0 to 65535")
    return ((wide + 128) // 257).astype(np.uint8)
