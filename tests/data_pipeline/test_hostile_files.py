"""Cut-off, altered and hostile files: they are read, or refused in one line, without much memory and without end."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_fast.data import lmdb_store, make_loader, open_images
from nvae_fast.errors import InputError

Builder = Callable[[Path, np.ndarray], tuple[Path, Path, dict]]


def encoded(image: np.ndarray, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, kind)
    return stream.getvalue()


def files(kind: str) -> Builder:
    def build(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
        for i, image in enumerate(images):
            (place / f"{i}.{kind}").write_bytes(encoded(image, "JPEG" if kind == "jpg" else kind.upper()))
        return place, place / f"1.{kind}", {"valid_fraction": 0.01}

    return build


def zipped(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    with zipfile.ZipFile(place / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, image in enumerate(images):
            archive.writestr(f"{i}.png", encoded(image, "PNG"))
    return place / "a.zip", place / "a.zip", {}


def tarred(path: Path, images: np.ndarray) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for i, image in enumerate(images):
            info, content = tarfile.TarInfo(f"{'long' * 40}/{i}.png"), encoded(image, "PNG")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def tar(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    tarred(place / "a.tar", images)
    return place / "a.tar", place / "a.tar", {}


def webdataset(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    for name in ("train", "valid"):
        tarred(place / f"{name}.tar", images)
    return place, place / "train.tar", {}


def idx(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    path = place / "x-idx3-ubyte"
    path.write_bytes(struct.pack(">4I", 0x803, *images.shape[:3]) + images[..., 0].tobytes())
    return path, path, {}


def idx_gz(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    path, _, _ = idx(place, images)
    path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_suffix(".gz"), path.with_suffix(".gz"), {"dataset": "mnist"}


def cifar(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    rows = np.resize(images, (2, 3072))
    content = pickle.dumps({b"labels": [0, 1], b"data": rows, b"filenames": [b"a", b"b"]}, protocol=2)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        (place / name).write_bytes(content)
    return place, place / "data_batch_2", {}


def cifar_tar(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    with tarfile.open(place / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = 3073
            archive.addfile(info, io.BytesIO(np.resize(images, 3073).tobytes()))
    return place / "cifar-10-binary.tar.gz", place / "cifar-10-binary.tar.gz", {}


def npy(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    np.save(place / "a.npy", images)
    return place / "a.npy", place / "a.npy", {}


def npz(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    np.savez_compressed(place / "a.npz", images=images)
    return place / "a.npz", place / "a.npz", {}


def tfrecords(place: Path, images: np.ndarray) -> tuple[Path, Path, dict]:
    from nvae_fast.data.crc32c import masked

    def part(number: int, body: bytes) -> bytes:
        size = bytes([len(body) & 127 | 128, len(body) >> 7]) if len(body) > 127 else bytes([len(body)])
        return bytes([number << 3 | 2]) + size + body

    for name in ("train", "validation"):
        (place / name).mkdir()
        with open(place / name / "a.tfrecords", "wb") as file:
            for image in images:
                shape = part(1, part(1, b"shape") + part(2, part(3, part(1, bytes(image.shape)))))
                data = part(1, part(1, b"data") + part(2, part(1, part(1, image.tobytes()))))
                body, length = part(1, shape + data), b""
                length = struct.pack("<Q", len(body))
                file.write(length + struct.pack("<I", masked(length)) + body + struct.pack("<I", masked(body)))
    return place, place / "train" / "a.tfrecords", {}


FORMATS: dict[str, Builder] = {
    "png": files("png"), "jpg": files("jpg"), "gif": files("gif"), "webp": files("webp"), "tiff": files("tiff"),
    "bmp": files("bmp"), "ppm": files("ppm"), "zip": zipped, "tar": tar, "webdataset": webdataset, "idx": idx, "idx.gz": idx_gz,
    "cifar": cifar, "cifar.tar.gz": cifar_tar, "npy": npy, "npz": npz, "tfrecords": tfrecords,
}  # fmt: skip


def read_all(spec: Path, **options) -> None:
    for split in ("train", "valid"):
        for _ in make_loader(open_images(spec, split=split, max_corrupt=0, **options), 2, train=False, seed=0, workers=1):
            pass


def survives(spec: Path, what: str, **options) -> bool:
    """Whether it is read; refused in one line is fine, too, anything else is not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_all(spec, **options)
        return True
    except InputError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 600, what
        return False


@pytest.mark.parametrize("name", FORMATS)
def test_cut_off_and_altered_files(tmp_path, pixels, name):
    spec, victim, options = FORMATS[name](tmp_path, pixels(4, 7, 6, 3))
    assert survives(spec, "whole", **options)
    content = victim.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    ends = [int(n) for n in np.unique(np.linspace(0, len(content) - 1, 16, dtype=int))]
    for end in ends:
        victim.write_bytes(content[:end])
        refused += not survives(spec, f"cut off at {end}", **options)
    assert refused >= len(ends) - (4 if "tar" in name or name in ("webdataset", "gif", "jpg", "tiff") else 2)
    for i in range(60):
        altered = bytearray(content)
        front = i % 2 == 0  # headers are where it hurts
        for _ in range(1 + i % 3):
            altered[generator.integers(min(len(content), 64) if front else len(content))] = generator.integers(256)
        victim.write_bytes(altered)
        survives(spec, f"alteration {i}", **options)


def test_altered_values_of_lmdbs(tmp_path, pixels):
    pytest.importorskip("lmdb")
    generator = np.random.default_rng(0)
    good = {"imagenet_32": pixels(8, 8, 3).tobytes(), "celeba_64": encoded(pixels(200, 180, 3), "JPEG")}
    cut = [bytes(c[: generator.integers(len(c) + 1)]) for c in good.values() for _ in range(8)]
    for i, value in enumerate([*good.values(), b"", *cut]):
        (tmp_path / str(i)).mkdir()
        for store in lmdb_store.STORES:
            lmdb_store.write_lmdb(tmp_path / str(i) / store, [[value]])
        for dataset in good:
            read = survives(tmp_path / str(i), f"value {i}", dataset=dataset)
            assert i >= 3 or read == (value == good[dataset])


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def npy_header(shape: tuple, descr: str = "|u1") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def zip_of(name: str, content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return stream.getvalue()


def laughs() -> bytes:
    """A dictionary whose key is a tuple that holds itself twice, sixty levels deep: its hash takes 2^60 steps."""
    return b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"K\x01s."


ABSURD = {
    "png of 60000x60000": ("a.png", png(60_000, 60_000), "has over"),
    "png of 12000x12000": ("a.png", png(12_000, 12_000), "has over"),
    "tar with a member of 8 EiB": ("a.tar", header("a.png", 2**63 - 1) + bytes(1024), "a.tar"),
    "tar with a name of 8 GiB": ("a.tar", header("a", 2**33, tarfile.GNUTYPE_LONGNAME) + bytes(1024), "a.tar"),
    "tar with an extended header of 1 TiB": ("a.tar", header("a", 2**40, tarfile.XHDTYPE) + bytes(1024), "a.tar"),
    "tar with a negative size": ("a.tar", header("a.png", 5)[:124] + b"\xff" * 12 + header("a.png", 5)[136:], "a.tar"),
    "npy of 1 TB": ("a.npy", npy_header((10**12,)) + bytes(9), "its header promises"),
    "npy of a negative shape": ("a.npy", npy_header((-5, 3, 3)) + bytes(99), "its header promises"),
    "npy of objects": ("a.npy", npy_header((5, 3, 3), "|O") + bytes(99), "pickled objects"),
    "npy with a header of 4 GB": ("a.npy", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99), "header is damaged"),
    "npz of 1 TB": ("a.npz", zip_of("images.npy", npy_header((10**12,)) + bytes(9)), "its header promises"),
    "npz of objects": ("a.npz", zip_of("images.npy", npy_header((5, 3, 3), "|O") + bytes(99)), "pickled objects"),
    "npz with a header that unpacks to 1 GB": (
        "a.npz", zip_of("images.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**25) + bytes(2**25)), "header is damaged",
    ),
    "idx of 2^96 pixels": ("x-idx3-ubyte", struct.pack(">4I", 0x803, *[2**32 - 1] * 3) + bytes(9), "says that it has"),
    "idx.gz that unpacks to more": (
        "x-idx3-ubyte.gz", gzip.compress(struct.pack(">4I", 0x803, 2, 3, 3) + bytes(2**26)), "more bytes of pixels",
    ),
    "pickle with bytes of 1 TB": ("data_batch_1", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.", "data_batch_1"),
    "pickle with a memo of 2^31": ("data_batch_1", b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".", "data_batch_1"),
    "pickle with a key without end": ("data_batch_1", laughs(), "data_batch_1"),
    "pickle with an array of 1 TB": (
        "data_batch_1", b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86tR.", "data_batch_1",
    ),
    "pickle that runs a command": ("data_batch_1", b"cposix\nsystem\n(S'touch /tmp/never'\ntR.", "posix.system"),
    "tfrecord of 8 EiB": ("train/a.tfrecords", struct.pack("<QI", 2**63, 0) + bytes(9), "a length and its CRC"),
}  # fmt: skip


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes_cost_no_memory(tmp_path, name):
    file, content, part = ABSURD[name]
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    spec = path
    if file == "a.png":
        spec = tmp_path
        (tmp_path / "b.png").write_bytes(content)
    elif file in ("data_batch_1", "train/a.tfrecords"):
        spec = tmp_path
        (tmp_path / "validation").mkdir()
        (tmp_path / "validation" / "b.tfrecords" if "tfrecord" in name else tmp_path / "test_batch").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read_all(spec)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert peak < 48 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_a_shard_with_such_headers(tmp_path, pixels):
    tarred(tmp_path / "valid.tar", pixels(2, 4, 4, 3))
    for name in [name for name in ABSURD if name.startswith("tar ")]:
        (tmp_path / "train.tar").write_bytes(ABSURD[name][1])
        assert not survives(tmp_path, name)
    whole = (tmp_path / "valid.tar").read_bytes()
    for repeats in (2, 3):  # a size in an extended header that leads back to the start would go round for ever
        record = b"27 size=-" + b"9" * 15 + b"\n" + b"\n"
        pax = header("pax", len(record), tarfile.XHDTYPE) + record + bytes(512 - len(record))
        (tmp_path / "train.tar").write_bytes((pax + header("a.png", 5)) * repeats + whole)
        survives(tmp_path, "going back")
