"""Images stored as arrays: .npy and .npz, IDX (MNIST and its relatives), the bundled demo set, Omniglot's .mat."""

from __future__ import annotations

import gzip
import io
import math
import re
import struct
import zipfile
import zlib
from importlib import resources
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import InputError
from .base import ImageSource, Request, find_pair, from_array, one_line, read_up_to, split_indices
from .rng import STACK, permutation

_MOST_PER_BYTE = 1032  # deflate's largest ratio: headers that promise more lie, and would cost memory


def read_numpy(request: Request) -> ImageSource:
    """One array of images, or an archive of them (see `_pick`); nothing is unpickled."""
    path = request.path
    with open(path, "rb") as stream:
        try:
            start = stream.read(6)
            if not start.startswith((b"\x93NUMPY", b"PK")):  # numpy takes anything else for a pickle
                raise InputError(f"{path} is not a numpy file: expected one written by np.save or np.savez")
            stream.seek(0)
            if start.startswith(b"PK"):
                with zipfile.ZipFile(stream) as archive:
                    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
                    key, whole = _pick(request, list(members))
                    with archive.open(members[key]) as member:
                        _check_header(member, min(members[key].file_size, _MOST_PER_BYTE * members[key].compress_size))
                    with archive.open(members[key]) as member:
                        array = np.lib.format.read_array(member, allow_pickle=False)
            else:
                key, whole = "", False
                _check_header(stream, path.stat().st_size)
                stream.seek(0)
                array = np.load(stream, allow_pickle=False)
        except InputError:
            raise
        except Exception as error:  # numpy's and zipfile's readers raise whatever a damaged file leads them to
            if "pickle" in str(error):
                raise InputError(f"{path} holds pickled objects, which are not read: save the images as uint8") from None
            raise InputError(f"{path} is not a readable numpy file: {one_line(error)}") from None
    name = f"{path}:{key}" if key else str(path)
    return from_array(request, _images(array, name)) if whole else _split_array(request, array, name)


def _check_header(stream: IO[bytes], size: int) -> None:
    """ValueError unless a .npy header promises an array of numbers that fits `size` bytes: numpy would allocate it first."""
    major, _ = np.lib.format.read_magic(stream)
    width, read = {1: (2, np.lib.format.read_array_header_1_0), 2: (4, np.lib.format.read_array_header_2_0)}[major]
    length = stream.read(width)
    if len(length) < width or int.from_bytes(length, "little") > 10_000:
        raise ValueError("its header is damaged")
    header = length + stream.read(int.from_bytes(length, "little"))
    shape, _, dtype = read(io.BytesIO(header))
    if dtype.hasobject:
        raise ValueError("pickled objects")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > size:
        raise ValueError(f"its header promises an array of shape {shape} and type {dtype}, the file has at most {size} bytes")


def _pick(request: Request, keys: list[str]) -> tuple[str, bool]:
    """The key to read, and whether it is a split of its own; else it is one array to be split."""
    pair = find_pair(keys)
    if pair is not None:
        return pair[0 if request.split == "train" else 1], True
    key = next((k for k in ("samples", "images", "arr_0") if k in keys), keys[0] if len(keys) == 1 else None)
    if key is None:
        raise InputError(
            f"{request.path} holds the arrays {', '.join(sorted(keys)) or '(none)'}: expected train and valid, "
            f"x_train and x_test, or one array named images"
        )
    return key, False


def _split_array(request: Request, array: np.ndarray, name: str) -> ImageSource:
    images = _images(array, name)
    return from_array(request, images[split_indices(request, len(images))])


def _images(array: np.ndarray, name: str) -> np.ndarray:
    """uint8 [N,H,W,C] from [N,H,W], [N,H,W,C] or [N,C,H,W].

    The channels are the smaller of the second and the last axis (the last in a tie), and at most 16.
    """
    shape = "x".join(map(str, array.shape))
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"{name} has shape [{shape}], expected [N,H,W], [N,H,W,C] or [N,C,H,W], none of them 0")
    if array.ndim == 3:
        array = array[..., None]
    elif array.shape[3] > array.shape[1]:
        array = array.transpose(0, 2, 3, 1)
    if array.shape[3] > 16:
        raise InputError(f"{name} has shape [{shape}], expected at most 16 channels, first or last")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name} is {array.dtype}, expected uint8 levels or floats in [0, 1]: use .astype('uint8')")
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # also where either is NaN
        raise InputError(f"{name} has values from {low:g} to {high:g}, expected [0, 1]: divide by the largest level")
    levels = np.empty(array.shape, np.uint8)
    for i in range(0, len(array), 1024):  # no temporary of the size of the whole
        levels[i : i + 1024] = np.rint(array[i : i + 1024] * 255.0)
    return levels


def idx_images(stream: IO[bytes], name: str) -> np.ndarray:
    """uint8 [N,H,W,1] of an IDX file of images, plain or gzip. Errors: an InputError that names it."""
    compressed = stream.read(2) == b"\x1f\x8b"
    stored = stream.seek(0, 2)
    stream.seek(0)
    try:
        with gzip.open(stream) if compressed else stream as file:
            head = file.read(16)
            if len(head) < 16 or head[:4] != b"\0\0\x08\x03":
                labels = " (a file of labels)" if head[:4] == b"\0\0\x08\x01" else ""
                found = f"0x{head[:4].hex()}{labels}"
                raise InputError(f"{name} starts with {found}, expected 0x00000803: not an IDX file of images")
            shape = struct.unpack(">3I", head[4:])
            size = shape[0] * shape[1] * shape[2]
            if size > _MOST_PER_BYTE * stored:
                raise InputError(f"{name} says that it has {size} bytes of pixels, the file has {stored}: fetch it again")
            pixels = read_up_to(file, size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name} cannot be read (damaged gzip?): {one_line(error)}; fetch it again") from None
    if len(pixels) != size or size == 0:
        what = f"{shape[0]} images of {shape[1]}x{shape[2]}"
        found = "more bytes of pixels" if len(pixels) > size else f"{len(pixels)} bytes of pixels"
        raise InputError(f"{name} holds {found}, expected {size} for {what}: fetch it again")
    return np.frombuffer(pixels, np.uint8).reshape(*shape, 1)


def find_idx(folder: Path, inner: str) -> dict[str, Path]:
    """{'train': path, 'valid': path}, or less: MNIST-named files in a folder, its raw/, `inner`/raw or `inner`."""
    for place in (folder, folder / "raw", folder / inner / "raw", folder / inner):
        if place.is_dir():
            found = {}
            for file in sorted(place.iterdir(), reverse=True):  # the plain file wins over its .gz
                match = re.fullmatch(r"(train|t10k)-images[-.]idx3-ubyte(\.gz)?", file.name)
                if match:
                    found["train" if match[1] == "train" else "valid"] = file
            if found:
                return found
    return {}


def _idx(request: Request, inner: str) -> np.ndarray:
    if request.path.is_file():
        with open(request.path, "rb") as stream:
            images = idx_images(stream, str(request.path))
        return images[split_indices(request, len(images))]
    found = find_idx(request.path, inner)
    if request.split not in found:
        stem = "train" if request.split == "train" else "t10k"
        raise InputError(f"no {stem}-images-idx3-ubyte[.gz] in {request.path}: give --data the folder of the files")
    path = found[request.split]
    with open(path, "rb") as stream:
        return idx_images(stream, str(path))


def read_mnist(request: Request) -> ImageSource:
    """MNIST-style files: train-images and t10k-images in a folder, or one IDX file, which is split."""
    return from_array(request, _idx(request, "MNIST"))


def read_fashion_mnist(request: Request) -> ImageSource:
    """The same in Fashion-MNIST's folder."""
    return from_array(request, _idx(request, "FashionMNIST"))


def read_stacked_mnist(request: Request) -> ImageSource:
    """2 N items of three digits each: every channel goes through two random permutations of the N digits."""
    digits = _idx(request, "MNIST")[..., 0]
    order = [
        np.concatenate([permutation(len(digits), request.seed, 2 * channel + turn, STACK) for turn in (0, 1)])
        for channel in range(3)
    ]
    return from_array(request, np.stack([digits[o] for o in order], axis=-1))


def read_demo(request: Request) -> ImageSource:
    """The 10,000 test images of Fashion-MNIST (Zalando, MIT): the first 9,000 train, the last 1,000 validate."""
    name = "t10k-images-idx3-ubyte.gz"
    with resources.files(__package__).joinpath("demo", name).open("rb") as stream:
        images = idx_images(stream, f"the bundled {name}")
    return from_array(request, images[:9000] if request.split == "train" else images[9000:])


def read_omniglot(request: Request) -> ImageSource:
    """`chardata.mat` of the IWAE repository: `data` trains, `testdata` validates; columns are 28x28, transposed."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError("reading Omniglot's .mat file needs scipy: pip install nvae_fast[omniglot]") from None
    path = request.path / "chardata.mat" if request.path.is_dir() else request.path
    if not path.is_file():
        raise InputError(f"no chardata.mat in {request.path}: take it from the IWAE repository, name its folder in --data")
    key = "data" if request.split == "train" else "testdata"
    try:
        columns = loadmat(path, variable_names=[key])[key]
    except Exception as error:  # scipy's reader raises whatever a damaged file leads it to
        raise InputError(f"{path} is not a MATLAB file with the matrix '{key}': {one_line(error)}") from None
    if columns.ndim != 2 or columns.shape[0] != 784 or not np.issubdtype(columns.dtype, np.floating):
        raise InputError(f"{path}: '{key}' is {columns.dtype} {columns.shape}, expected floats (784, N)")
    images = columns.reshape(28, 28, -1).transpose(2, 1, 0)
    return from_array(request, (images * 255).astype(np.uint8)[..., None])
