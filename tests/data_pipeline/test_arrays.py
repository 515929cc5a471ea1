"""Arrays: .npy, .npz, IDX files, stacked MNIST, Omniglot."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from nvae_fast.data import open_images


def write_idx(path: Path, images: np.ndarray, magic: int = 0x803, extra: bytes = b"", count: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">4I", magic, len(images) if count is None else count, *images.shape[1:])
    content = head + images.tobytes() + extra
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def both(path: Path, **options) -> np.ndarray:
    """All images of both splits, in a canonical order."""
    images = np.concatenate([open_images(path, split=s, **options).images.numpy() for s in ("train", "valid")])
    return images[np.lexsort(images.reshape(len(images), -1).T)]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((12, 5, 4), (5, 4, 1)),
        ((12, 9, 8, 3), (9, 8, 3)),
        ((12, 3, 9, 8), (9, 8, 3)),
        ((12, 1, 4, 4), (4, 4, 1)),
        ((12, 4, 4, 4), (4, 4, 4)),
        ((12, 16, 17, 18), (17, 18, 16)),
        ((12, 20, 20, 7), (20, 20, 7)),
    ],
)
def test_layouts(tmp_path, pixels, shape, expected):
    array = pixels(*shape)
    np.save(tmp_path / "a.npy", array)
    source = open_images(tmp_path / "a.npy", split="valid")
    assert source[0].shape == expected and len(source) == 1 and source.channels == expected[-1]
    last = array[..., None] if array.ndim == 3 else array if array.shape[-1] == expected[-1] else np.moveaxis(array, 1, 3)
    assert np.array_equal(both(tmp_path / "a.npy"), last[np.lexsort(last.reshape(12, -1).T)])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_become_levels(tmp_path, dtype):
    levels = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 16, 16), (2, 1, 1))
    np.save(tmp_path / "a.npy", (levels / 255).astype(dtype))
    assert np.array_equal(open_images(tmp_path / "a.npy", valid_fraction=0.5)[0][..., 0], levels[0])


def test_image_size_of_arrays(tmp_path, pixels):
    np.save(tmp_path / "a.npy", pixels(4, 10, 8, 5))
    assert open_images(tmp_path / "a.npy", image_size=(4, 4)).images.shape == (3, 4, 4, 5)
    assert open_images("demo", split="valid", image_size=(32, 32)).images.shape == (1000, 32, 32, 1)


def test_npz_keys(tmp_path, pixels):
    train, other = pixels(4, 6, 6, 3), pixels(2, 6, 6, 3, seed=1)
    path = tmp_path / "a.npz"
    for first, second in (("train", "valid"), ("train", "test"), ("x_train", "x_test")):
        np.savez_compressed(path, **{first: train, second: other, "y_train": np.arange(4)})
        assert np.array_equal(open_images(path).images, train)
        assert np.array_equal(open_images(path, split="valid").images, other)
    for keys in (["samples", "y"], ["images", "y"], ["anything"], ["arr_0", "arr_1"]):
        np.savez(path, **{key: train for key in keys})
        assert len(open_images(path)) == 3 and len(both(path)) == 4


def test_bad_arrays(tmp_path, pixels, refused):
    path = tmp_path / "a.npy"
    for array, part in [
        (pixels(4, 4), "has shape [4x4], expected [N,H,W]"),
        (np.array(3), "has shape [], expected"),
        (pixels(0, 4, 4), "has shape [0x4x4]"),
        (pixels(4, 20, 20, 20), "at most 16 channels"),
        (pixels(4, 5, 5).astype(np.int64), "is int64, expected uint8 levels or floats in [0, 1]"),
        (pixels(4, 5, 5).astype(np.float32), ", expected [0, 1]: divide by the largest level"),
        (np.full((4, 5, 5), np.nan), "has values from nan to nan"),
        (np.full((4, 5, 5), -0.1), "has values from -0.1 to -0.1"),
        (pixels(1, 5, 5), "1 image(s), at least 2"),
        (np.array([[[{}]]] * 3, dtype=object), "holds pickled objects, which are not read"),
    ]:
        np.save(path, array, allow_pickle=True)
        refused(path, "a.npy", part)
    np.savez(tmp_path / "a.npz", images=np.array([[[{}]]] * 3, dtype=object))
    refused(tmp_path / "a.npz", "a.npz holds pickled objects")
    np.savez(tmp_path / "a.npz", images=pixels(4, 4))
    refused(tmp_path / "a.npz", "a.npz:images has shape [4x4]")
    np.savez(tmp_path / "a.npz", one=pixels(4, 4, 4), two=pixels(4, 4, 4))
    refused(tmp_path / "a.npz", "holds the arrays one, two: expected train and valid")
    np.savez(tmp_path / "a.npz")
    refused(tmp_path / "a.npz", "holds the arrays (none)")


def test_damaged_arrays(tmp_path, pixels, refused):
    np.save(tmp_path / "a.npy", pixels(4, 8, 8))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-10])
    refused(tmp_path / "a.npy", "a.npy is not a readable numpy file")
    (tmp_path / "a.npy").write_text("no array")
    refused(tmp_path / "a.npy", "a.npy is not a numpy file")
    (tmp_path / "a.npy").write_bytes(b"")
    refused(tmp_path / "a.npy", "a.npy is not a numpy file")
    np.savez_compressed(tmp_path / "a.npz", images=pixels(40, 8, 8))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[300:340] = bytes(40)
    (tmp_path / "a.npz").write_bytes(content)
    refused(tmp_path / "a.npz", "a.npz is not a readable numpy file")
    (tmp_path / "a.npz").write_bytes(content[:400])
    refused(tmp_path / "a.npz", "a.npz is not a readable numpy file")
    (tmp_path / "d.npy").mkdir()
    refused(tmp_path / "d.npy", "Is a directory", dataset="npy")
    with open(tmp_path / "h.npy", "wb") as file:  # claims 8 exabytes
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2**33, 2**15, 2**15)})
    refused(tmp_path / "h.npy", "h.npy is not a readable numpy file")


@pytest.mark.parametrize("pattern", ["{}-images-idx3-ubyte", "{}-images-idx3-ubyte.gz", "{}-images.idx3-ubyte"])
@pytest.mark.parametrize(
    ("place", "name"),
    [("", "mnist"), ("raw", "mnist"), ("MNIST/raw", "mnist"), ("FashionMNIST/raw", "fashion_mnist")],
)
def test_idx_folders(tmp_path, pixels, pattern, place, name):
    train, test = pixels(6, 7, 5), pixels(3, 7, 5, seed=1)
    write_idx(tmp_path / place / pattern.format("train"), train)
    write_idx(tmp_path / place / pattern.format("t10k"), test)
    (tmp_path / place / "train-labels-idx1-ubyte").write_bytes(b"ignored")
    for options in ({}, {"dataset": name}):
        source = open_images(tmp_path, **options)
        assert source.name == name and np.array_equal(source.images[..., 0], train)
        assert np.array_equal(open_images(tmp_path, split="valid", **options).images[..., 0], test)


def test_idx_names(tmp_path, pixels, refused):
    one = tmp_path / "fashion" / "train-images-idx3-ubyte.gz"
    write_idx(one, pixels(20, 4, 4))
    assert open_images(one).name == "fashion_mnist" and len(open_images(one)) == 18
    assert len(both(one)) == 20
    assert open_images(one.parent).name == "fashion_mnist"
    refused(one.parent, "no t10k-images-idx3-ubyte[.gz] in", "give --data", split="valid")
    refused(tmp_path, "no train-images-idx3-ubyte[.gz] in", dataset="mnist")
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", pixels(4, 4, 4))
    write_idx(tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte", pixels(5, 4, 4))
    refused(tmp_path, "holds several data sets: choose one with --dataset (mnist, fashion_mnist)")
    assert len(open_images(tmp_path, dataset="mnist")) == 4
    assert len(open_images(tmp_path, dataset="fashion_mnist")) == 5


def test_damaged_idx(tmp_path, pixels, refused):
    images, path = pixels(20, 6, 6), tmp_path / "x-idx3-ubyte"
    write_idx(path, images, magic=0x801)
    refused(path, "x-idx3-ubyte starts with 0x00000801 (a file of labels), expected 0x00000803")
    write_idx(path, images, count=21)
    refused(path, "holds 720 bytes of pixels, expected 756 for 21 images of 6x6")
    write_idx(path, images, extra=b"more")
    refused(path, "holds more bytes of pixels, expected 720")
    write_idx(path, images, count=2**32 - 1)
    refused(path, "says that it has 154618822620 bytes")
    path.write_bytes(b"\0\0")
    refused(path, "starts with 0x0000, expected 0x00000803")
    packed = tmp_path / "y-idx3-ubyte.gz"
    write_idx(packed, images)
    whole = packed.read_bytes()
    packed.write_bytes(whole[: len(whole) // 2])
    refused(packed, "y-idx3-ubyte.gz cannot be read (damaged gzip?)", "fetch it again")
    packed.write_bytes(whole[:100] + bytes(50) + whole[150:])
    refused(packed, "y-idx3-ubyte.gz cannot be read (damaged gzip?)")
    packed.write_bytes(whole[:-8] + bytes(8))
    refused(packed, "y-idx3-ubyte.gz cannot be read (damaged gzip?)", "CRC")


def test_stacked_mnist(tmp_path, pixels):
    train = pixels(30, 4, 4)
    write_idx(tmp_path / "train-images-idx3-ubyte", train)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", pixels(5, 4, 4, seed=1))
    source = open_images(tmp_path, dataset="stacked_mnist", seed=4)
    assert source.images.shape == (60, 4, 4, 3)
    known = [image.tobytes() for image in train]
    for channel in range(3):
        order = [known.index(image.tobytes()) for image in source.images[..., channel].numpy()]
        assert sorted(order[:30]) == sorted(order[30:]) == list(range(30)) and order[:30] != order[30:]
    assert not np.array_equal(source.images[..., 0], source.images[..., 1])
    assert np.array_equal(source.images, open_images(tmp_path, dataset="stacked_mnist", seed=4).images)
    assert not np.array_equal(source.images, open_images(tmp_path, dataset="stacked_mnist", seed=5).images)
    assert len(open_images(tmp_path, dataset="stacked_mnist", split="valid")) == 10


def test_omniglot(tmp_path, pixels, refused):
    io = pytest.importorskip("scipy.io")
    train, test = pixels(6, 28, 28), pixels(3, 28, 28, seed=1)
    columns = {key: (x / 255).transpose(0, 2, 1).reshape(-1, 784).T for key, x in (("data", train), ("testdata", test))}
    io.savemat(tmp_path / "chardata.mat", columns)
    for spec, dataset in ((tmp_path, None), (tmp_path, "omniglot"), (tmp_path / "chardata.mat", None)):
        for split, x in (("train", train), ("valid", test)):
            expected = (x / 255 * 255).astype(np.uint8)  # cut off, as the reference does
            assert np.array_equal(open_images(spec, dataset=dataset, split=split).images[..., 0], expected)
    io.savemat(tmp_path / "chardata.mat", {"data": np.zeros((100, 3))})
    refused(tmp_path, "'data' is float64 (100, 3), expected floats (784, N)")
    refused(tmp_path, "is not a MATLAB file with the matrix 'testdata'", split="valid")
    (tmp_path / "chardata.mat").write_bytes(b"no matrix")
    refused(tmp_path, "chardata.mat is not a MATLAB file")


def test_omniglot_without_its_file_or_scipy(tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused(tmp_path, "needs scipy: pip install nvae_fast[omniglot]", dataset="omniglot")
    monkeypatch.undo()
    pytest.importorskip("scipy.io")
    refused(tmp_path, "no chardata.mat in", dataset="omniglot")
