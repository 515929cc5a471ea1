"""From the bytes of an image file to pixels.

A set whose every image is grey (modes 1, L, LA and grey of 16 bits) has one channel, any other set three. Of 16 bits, grey
goes to the nearest of 256 levels and colour keeps the upper byte (Pillow's reading). Transparency is shown on white, EXIF
orientation is obeyed, palettes are looked up, CMYK becomes RGB by Pillow's plain formula, colour profiles are ignored, and of
an animation the first frame counts. Floating-point pixels are refused. No image may have more pixels than Pillow's
`Image.MAX_IMAGE_PIXELS`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from ..errors import InputError
from .base import one_line, read_up_to
from .corrupt import CorruptImage

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# Pillow looks at the content, not at the name: without a list, a .png that is PostScript would start Ghostscript.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
MAX_FILE = 2**28
"""No file of one image has more bytes: what an archive says about a member is not believed beyond this."""
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")


def _failed(label: str, error: Exception) -> CorruptImage:
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return CorruptImage(f"{label} has over {Image.MAX_IMAGE_PIXELS} pixels (Pillow's limit): shrink it or take it out")
    if isinstance(error, Image.UnidentifiedImageError):
        return CorruptImage(f"{label} is no image of a known kind ({', '.join(_FORMATS)}): replace it or take it out")
    return CorruptImage(f"{label} cannot be decoded ({one_line(error)}): replace it or take it out")


def _open(opened: Callable[[], BinaryIO], label: str) -> BinaryIO:
    """A file that is gone or may not be read is no corrupt image: passing over it would hide what is wrong."""
    try:
        return opened()
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # zipfile: damaged, encrypted, unknown method
        raise _failed(label, error) from None
    except OSError as error:
        raise InputError(f"cannot read {label}: {error.strerror or one_line(error)}") from None


def _check_pixels(image: Image.Image) -> None:
    """Pillow refuses an image only above twice its limit."""
    if Image.MAX_IMAGE_PIXELS is not None and image.size[0] * image.size[1] > Image.MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError


def head(opened: Callable[[], BinaryIO], label: str) -> tuple[bool, tuple[int, int]]:
    """Whether the image is grey, and (height, width) as it is to be shown; reads the header only."""
    with _open(opened, label) as stream:
        try:
            with Image.open(stream, formats=_FORMATS) as image:
                _check_pixels(image)
                # versions of Pillow differ in whether the size of a turned TIFF is the stored or the shown one
                width, height = image.size
                if isinstance(image, TiffImageFile):
                    width, height = int(image.tag_v2[256]), int(image.tag_v2[257])
                # asked for the EXIF of a PNG without one in front, Pillow decodes all of it to look behind the pixels
                exif = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
                turned = exif.get(0x0112) in (5, 6, 7, 8)
                return image.mode in _GREY, (width, height) if turned else (height, width)
        except Exception as error:  # decoders raise whatever a damaged file leads them to
            raise _failed(label, error) from None


def decode(opened: Callable[[], BinaryIO], label: str, channels: int) -> np.ndarray:
    """uint8 [h,w,channels] (1 or 3) of an encoded image. Errors: a CorruptImage that names `label`."""
    with _open(opened, label) as stream:
        try:
            with Image.open(stream, formats=_FORMATS) as image:
                _check_pixels(image)
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


def read_file(opened: Callable[[], BinaryIO], label: str) -> bytes:
    """The bytes of an image file, at most MAX_FILE of them. Errors: a CorruptImage that names `label`."""
    with _open(opened, label) as stream:
        try:
            content = read_up_to(stream, MAX_FILE + 1)
        except Exception as error:  # of a damaged archive
            raise _failed(label, error) from None
    if len(content) > MAX_FILE:
        raise CorruptImage(f"{label} has over {MAX_FILE >> 20} MiB, which no image needs: take it out")
    return content
