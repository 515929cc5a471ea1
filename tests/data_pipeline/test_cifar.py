"""CIFAR-10: pickles that may be hostile, binary files, archives."""

from __future__ import annotations

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nvae_fast.data import open_images

NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def batch(images: np.ndarray) -> dict:
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
    return {b"batch_label": b"a batch", b"labels": list(range(len(images))), b"data": rows, b"filenames": [b"x.png"]}


@pytest.fixture
def images(pixels) -> dict[str, np.ndarray]:
    return {name: pixels(2, 32, 32, 3, seed=i) for i, name in enumerate(NAMES)}


@pytest.fixture
def folder(tmp_path, images) -> Path:
    place = tmp_path / "data" / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name, array in images.items():
        (place / name).write_bytes(pickle.dumps(batch(array), protocol=2))
    (place / "batches.meta").write_bytes(b"never read")
    return place


def check(spec: Path, images: dict[str, np.ndarray], **options) -> None:
    train, valid = (open_images(spec, split=s, **options) for s in ("train", "valid"))
    assert train.name == "cifar10" and train.images.shape == (10, 32, 32, 3)
    assert np.array_equal(train.images, np.concatenate([images[name] for name in NAMES[:5]]))
    assert np.array_equal(valid.images, images["test_batch"])


def test_pickles(folder, images):
    for spec in (folder, folder.parent):
        check(spec, images)
        check(spec, images, dataset="cifar10")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol(folder, images, protocol):
    for name, array in images.items():
        (folder / name).write_bytes(pickle.dumps(batch(array), protocol=protocol))
    check(folder, images)


def test_pickles_of_numpy_1(folder, images):
    for name, array in images.items():
        content = pickle.dumps(batch(array), protocol=2)
        (folder / name).write_bytes(content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    check(folder, images)


def test_archives_and_binary_files(folder, images, tmp_path):
    other = tmp_path / "archive"
    other.mkdir()
    with tarfile.open(other / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(folder, "cifar-10-batches-py")
    check(other, images)
    check(other / "cifar-10-python.tar.gz", images)
    binary = tmp_path / "b" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    for name, array in images.items():
        rows = batch(array)[b"data"]
        (binary / f"{name}.bin").write_bytes(np.hstack([np.ones((2, 1), np.uint8), rows]).tobytes())
    check(binary, images)
    check(binary.parent, images)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(binary, "cifar-10-batches-bin")
    check(tmp_path / "x.tar.gz", images)


class Command:
    """Calls function(*arguments) when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("what", ["system", "eval", "getattr"])
def test_a_hostile_pickle_runs_nothing(folder, tmp_path, refused, protocol, what):
    mark = tmp_path / "was_here"
    command = {
        "system": Command(os.system, f"touch {mark}"),
        "eval": Command(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
        "getattr": Command(getattr, dict, "fromkeys"),
    }[what]
    content = pickle.dumps({b"data": command}, protocol=protocol)
    (folder / "data_batch_3").write_bytes(content)
    refused(folder, "data_batch_3 asks for", f".{what}, which", "do not trust this file")
    assert not mark.exists()
    pickle.loads(content)  # it is what it seems
    assert mark.exists() or what == "getattr"


def test_damaged_files(folder, refused, tmp_path):
    whole = (folder / "data_batch_2").read_bytes()
    for content, part in [
        (whole[:2000], "data_batch_2 is not a readable CIFAR-10 pickle"),
        (b"", "data_batch_2 is not a readable CIFAR-10 pickle"),
        (b"no pickle at all", "data_batch_2 is not a readable CIFAR-10 pickle"),
        (pickle.dumps([1, 2]), "data_batch_2: 'data' is NoneType, expected uint8 (N, 3072)"),
        (pickle.dumps({"data": np.zeros((2, 3072))}), "'data' is f8 (2, 3072)"),
        (pickle.dumps({"data": np.zeros((2, 99), np.uint8)}), "'data' is uint8 (2, 99)"),
        (pickle.dumps({"data": np.zeros((0, 3072), np.uint8)}), "'data' is uint8 (0, 3072)"),
        (pickle.dumps({"data": np.array(3, np.uint8)}), "'data' is uint8 ()"),
        (pickle.dumps({"data": np.array([{}], object)}), "'data' is O8 (1,)"),
    ]:
        (folder / "data_batch_2").write_bytes(content)
        refused(folder, part, "fetch it again")
    (folder / "data_batch_2").unlink()
    refused(folder, "no data_batch_2 (or data_batch_2.bin) in", "incomplete")
    (folder / "data_batch_2.bin").write_bytes(bytes(3074))
    refused(folder, "data_batch_2.bin has 3074 bytes, expected a multiple of 3073")
    refused(tmp_path, "no CIFAR-10 in", "cifar-10-batches-py", dataset="cifar10")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(folder, "cifar-10-batches-py")
    content = (tmp_path / "x.tar.gz").read_bytes()
    for bad in (content[: len(content) // 2], b"no archive", content[:200] + bytes(100) + content[300:]):
        (tmp_path / "x.tar.gz").write_bytes(bad)
        refused(tmp_path / "x.tar.gz", "x.tar.gz is not a readable tar archive")
