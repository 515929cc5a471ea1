"""`open_images`: from what the user names to a sequence of images; `DATASETS`: every reader by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import InputError, unknown
from . import arrays, cifar, lmdb_store, shards, stream, tfrecord
from .base import ImageSource, Request, one_line
from .decode import IMAGE_SUFFIXES
from .folder import read_folder, read_tar, read_zip
from .transforms import Transform, check_side


@dataclass(frozen=True)
class Dataset:
    """A way to read images, and how the reference trains on them (section 14 of the specification).

    Args:
        read: the reader.
        side: the square size D of the model's images in pixels, padding included; None: as the data are.
        padding: pixels of zeros to add on each side. flip: mirror half of the training images.
        binarize: draw every pixel afresh, one with the probability of its level.
        channels: 3 where grey files are to become RGB; None: as the data are.
        resize: bring images to `side`; box: the part (left, top, right, bottom) that is cut out before;
        random_crop: training images are cropped at random places.
        stores: names of the training and validation LMDB that `read` looks for; without them, whatever lies at the path is
            read and treated in this way. encoded: their values are image files, not raw RGB.
    """

    read: Callable[[Request], ImageSource]
    side: int | None = None
    padding: int = 0
    flip: bool = False
    binarize: bool = False
    channels: int | None = None
    resize: bool = False
    box: tuple[int, int, int, int] | None = None
    random_crop: bool = False
    stores: tuple[str, str] | None = None
    encoded: bool = False


MAX_CORRUPT = 10
"""Unreadable images that are passed over, unless asked otherwise."""

# shown by the name of the folder or file that they are read from
_BY_PLACE = ("folder", "zip", "tar", "npy", "npz", "lmdb", "tfrecord", "webdataset")
_CURE = "give --data the path of the images (nothing is downloaded), or --data demo"


def _rgb(side: int) -> Dataset:
    stores = lmdb_store.STORES
    reader = lmdb_store.lmdb_reader(stores, lmdb_store.raw_rgb)
    return Dataset(reader, side, flip=True, channels=3, resize=True, stores=stores)


def _celeba_64() -> Dataset:
    reader = lmdb_store.lmdb_reader(lmdb_store.STORES, lmdb_store.encoded)
    box = (15, 40, 163, 188)
    return Dataset(reader, 64, flip=True, channels=3, resize=True, box=box, stores=lmdb_store.STORES, encoded=True)


def _lsun(scene: str, side: int) -> Dataset:
    stores = (f"{scene}_train_lmdb", f"{scene}_val_lmdb")
    reader = lmdb_store.lmdb_reader(stores, lmdb_store.encoded, numbered=False)
    return Dataset(reader, side, flip=True, channels=3, resize=True, random_crop=True, stores=stores, encoded=True)


DATASETS: dict[str, Dataset] = {
    "demo": Dataset(arrays.read_demo, 32, padding=2, binarize=True),
    "mnist": Dataset(arrays.read_mnist, 32, padding=2, binarize=True),
    "fashion_mnist": Dataset(arrays.read_fashion_mnist, 32, padding=2, binarize=True),
    "omniglot": Dataset(arrays.read_omniglot, 32, padding=2, binarize=True),
    "stacked_mnist": Dataset(arrays.read_stacked_mnist, 32, padding=2),
    "cifar10": Dataset(cifar.read_cifar10, 32, flip=True),
    "celeba_64": _celeba_64(),
    "celeba_256": _rgb(256),
    "ffhq": _rgb(256),
    "imagenet_32": _rgb(32),
    "lsun_bedroom_128": _lsun("bedroom", 128),
    "lsun_church_64": _lsun("church_outdoor", 64),
    "lsun_church_128": _lsun("church_outdoor", 128),
    "folder": Dataset(read_folder),
    "zip": Dataset(read_zip),
    "npy": Dataset(arrays.read_numpy),
    "npz": Dataset(arrays.read_numpy),
    "lmdb": Dataset(lmdb_store.read_described),
    "tar": Dataset(read_tar),
    "webdataset": Dataset(stream.read_shards),
    "tfrecord": Dataset(tfrecord.read_tfrecords),
}


def open_images(
    spec: str | Path,
    *,
    split: str = "train",
    dataset: str | None = None,
    image_size: tuple[int, int] | None = None,
    seed: int = 0,
    valid_fraction: float = 0.1,
    max_corrupt: int = MAX_CORRUPT,
    read: str | None = None,
    keep_small: bool = True,
    images_per_epoch: int | None = None,
    window: int = 1000,
) -> ImageSource:
    """The training or the validation images of a data set.

    Args:
        spec: "demo" (the bundled images; a folder of that name is "./demo"), a path, or WebDataset shards: paths or URLs with
            `{000..099}`, `{a,b}` or (paths) `*`.
        split: "train" or "valid". A set without splits of its own is cut by a permutation that depends on `seed`.
        dataset: a name of DATASETS; None: guessed from what lies at the path.
        image_size: (H, W) in pixels: images are scaled until they just cover it and centre-cropped; None: as they are,
            or the `side` of a data set that is always resized.
        valid_fraction: share of the validation images where the data have no splits, in (0, 1).
        max_corrupt: so many unreadable images are named and passed over; one more is an error.
        read: how to read what lies at the path, where that is not what `dataset` says: `dataset` then only treats the images.
        keep_small: decode a set of at most 256 MiB of pixels now and keep it.
        images_per_epoch, window: of a stream of shards; see stream.py.

    Raises:
        InputError: one line that names the file, what was expected and what to do.
    """
    if split not in ("train", "valid"):
        raise unknown("split", split, ("train", "valid"))
    for asked in (dataset, read):
        if asked is not None and asked not in DATASETS:
            raise unknown("dataset", asked, DATASETS)
    if not 0 < valid_fraction < 1:
        raise InputError(f"the validation share is {valid_fraction}, expected a number between 0 and 1")
    if image_size is not None and not (len(image_size) == 2 and all(isinstance(n, int) and n > 0 for n in image_size)):
        raise InputError(f"image size {image_size}, expected two whole numbers of pixels (height, width)")
    if image_size is not None:
        check_side(*image_size)
    if window < 1:
        raise InputError(f"--shuffle-window is {window}, expected at least 1")
    if max_corrupt < 0:
        raise InputError(f"--max-corrupt is {max_corrupt}, expected at least 0")
    if images_per_epoch is not None and images_per_epoch < 1:
        raise InputError(f"--images-per-epoch is {images_per_epoch}, expected at least 1")
    path = Path(spec).expanduser()
    try:
        names = shards.expand(str(spec))
        kind = read or ("webdataset" if names else None)
        name = dataset or kind or ("demo" if str(spec) == "demo" else guess(path))
        if name != "demo" and not names and not path.exists():
            what = f"dataset {name} is not bundled" if str(spec) == "demo" else f"{path} does not exist"
            raise InputError(f"{what}: {_CURE}")
        entry = DATASETS[name]
        if kind or (entry.stores and not any((path / store).exists() for store in entry.stores)):
            kind = kind or guess(path)
            entry = replace(entry, read=DATASETS[kind].read)
        if images_per_epoch is not None and (kind or name) != "webdataset":
            raise InputError(f"--images-per-epoch is for WebDataset shards, '{spec}' is read as {kind or name}: leave it out")
        side = entry.side if entry.resize else None
        size = (image_size[0], image_size[1]) if image_size else (side, side) if side else None
        transform = Transform(size, entry.box, entry.random_crop and split == "train")
        shown = path.resolve().name if name in _BY_PLACE else name
        return entry.read(Request(path, shown, split, seed, valid_fraction, transform, entry.channels, max_corrupt,
                                  names, images_per_epoch, window, keep_small))  # fmt: skip
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror or one_line(error)}") from None


def guess(path: Path) -> str:
    """The name in DATASETS for what lies at a path."""
    if not path.exists():
        raise InputError(f"{path} does not exist: {_CURE}")
    # the two have the same file names
    digits = "fashion_mnist" if any("fashion" in part.lower() for part in path.resolve().parts[-2:]) else "mnist"
    if path.is_file():
        suffixes = {".npy": "npy", ".npz": "npz", ".zip": "zip", ".mat": "omniglot", ".tgz": "cifar10", ".tar": "tar"}
        if path.name.endswith(".tar.gz"):
            return "cifar10"
        if path.suffix.lower() in suffixes:
            return suffixes[path.suffix.lower()]
        if "idx3-ubyte" in path.name:
            return digits
        hint = "give the folder it lies in" if path.suffix.lower() in IMAGE_SUFFIXES else "name its kind with --dataset"
        raise InputError(f"{path}: expected a folder of images or a .zip, .npy, .npz, IDX or CIFAR-10 file; {hint}")
    fits = [
        name
        for name, there in (
            (digits, arrays.find_idx(path, "MNIST")),
            ("fashion_mnist", arrays.find_idx(path / "FashionMNIST", "")),
            ("cifar10", cifar.find_cifar(path)),
            ("omniglot", (path / "chardata.mat").is_file()),
        )
        if there
    ]
    if len(fits) > 1:
        raise InputError(f"{path} holds several data sets: choose one with --dataset ({', '.join(fits)})")
    if fits:
        return fits[0]
    about = lmdb_store.description(path)
    if about:
        if about["dataset"] not in DATASETS:
            raise unknown(f"dataset in {path / lmdb_store.DESCRIPTION}", about["dataset"], DATASETS)
        return about["dataset"]
    found = has_stores(path)
    if found:
        names = ", ".join(name for name, entry in DATASETS.items() if entry.stores)
        raise InputError(f"{path} holds {found}: say which data set it is with --dataset ({names})")
    found = (n for _, _, files in os.walk(path) for n in sorted(files) if not n.startswith(".") and n != shards.INDEX)
    suffix = Path(next(found, "")).suffix.lower()  # one file tells: nothing else may lie beside images
    return "webdataset" if suffix == ".tar" else "tfrecord" if suffix in tfrecord.SUFFIXES else "folder"


def has_stores(path: Path) -> str | None:
    """The name of an LMDB in a folder that does not say what it holds."""
    if not path.is_dir() or lmdb_store.description(path):
        return None
    names = {store for entry in DATASETS.values() for store in entry.stores or ()}
    return min((file.name for file in path.iterdir() if file.name in names), default=None)
