"""The reference's LMDB layouts, and the same datasets as folders of images."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_fast.data import DATASETS, make_loader, open_images
from nvae_fast.data.lmdb_pages import fault
from nvae_fast.data.lmdb_store import _environment


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def write(path: Path, values: dict[bytes, bytes], subdir: bool = True) -> None:
    lmdb = pytest.importorskip("lmdb")
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = lmdb.open(str(path), map_size=2**24, subdir=subdir)
    with environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    environment.close()


def numbered(values: list[bytes]) -> dict[bytes, bytes]:
    return {str(i).encode(): value for i, value in enumerate(values)}


@pytest.mark.parametrize("subdir", [True, False])
def test_raw_rgb(tmp_path, pixels, subdir):
    images = pixels(12, 32, 32, 3)
    write(tmp_path / "train.lmdb", numbered([x.tobytes() for x in images]), subdir)
    write(tmp_path / "validation.lmdb", numbered([pixels(40, 40, 3).tobytes()]), subdir)
    source = open_images(tmp_path, dataset="imagenet_32")
    assert (len(source), source.images, source.name) == (12, None, "imagenet_32")
    assert all(np.array_equal(source[i], images[i]) for i in range(12))
    assert open_images(tmp_path, dataset="imagenet_32", split="valid")[0].shape == (32, 32, 3)  # 40x40 scaled
    assert open_images(tmp_path, dataset="imagenet_32", image_size=(16, 16))[0].shape == (16, 16, 3)
    batches = list(make_loader(source, 5, train=False, seed=0))
    assert [len(x) for x in batches] == [5, 5, 2]
    assert np.array_equal((batches[1] * 255).round().numpy().astype(np.uint8), images[5:10].transpose(0, 3, 1, 2))


def test_celeba_64(tmp_path, pixels):
    image = pixels(218, 178, 3)
    write(tmp_path / "train.lmdb", numbered([encode(image)]))
    cut = Image.fromarray(image).crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(open_images(tmp_path, dataset="celeba_64")[0], np.asarray(cut))
    entry = DATASETS["celeba_64"]
    assert (entry.side, entry.flip, entry.padding, entry.binarize) == (64, True, 0, False)


def test_lsun(tmp_path, pixels):
    images = pixels(3, 70, 100, 3)
    write(tmp_path / "church_outdoor_train_lmdb", {f"key{i}".encode(): encode(x) for i, x in enumerate(images)})
    write(tmp_path / "church_outdoor_val_lmdb", {b"a": encode(images[0], "WEBP")})
    source = open_images(tmp_path, dataset="lsun_church_64")
    assert source.random_crop and len(source) == 3
    small = Image.fromarray(images[1]).resize((91, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(source[1], np.asarray(small)[:, 14:78])  # round(13.5) = 14
    loader = make_loader(source, 3, train=True, seed=0)
    first = next(iter(loader))
    loader.set_epoch(1)
    assert first.shape == (3, 3, 64, 64) and not first.sort(0)[0].equal(next(iter(loader)).sort(0)[0])
    valid = open_images(tmp_path, dataset="lsun_church_64", split="valid")
    assert not valid.random_crop and valid[0].shape == (64, 64, 3)


def test_folders_of_images_get_the_same_transform(tmp_path, save):
    face = save(tmp_path / "celeba" / "train" / "1.png", 218, 178, 3)
    save(tmp_path / "celeba" / "valid" / "1.png", 218, 178)  # grey: still RGB
    cut = Image.fromarray(face).crop((15, 40, 163, 188)).resize((64, 64), Image.Resampling.BILINEAR)
    assert np.array_equal(open_images(tmp_path / "celeba", dataset="celeba_64")[0], np.asarray(cut))
    assert open_images(tmp_path / "celeba", dataset="celeba_64", split="valid").channels == 3
    scenes = open_images(tmp_path / "celeba", dataset="lsun_bedroom_128")
    assert scenes.random_crop and scenes.images is None and scenes[0].shape == (128, 128, 3)
    assert open_images(tmp_path / "celeba", dataset="lsun_bedroom_128", split="valid").images is not None


def test_errors(tmp_path, pixels, save, refused, monkeypatch):
    write(tmp_path / "train.lmdb", numbered([bytes(100)]))
    refused(tmp_path, "holds train.lmdb: say which data set it is with --dataset (celeba_64, celeba_256, ffhq")
    refused(tmp_path, "no validation.lmdb in", dataset="ffhq", split="valid")
    with pytest.raises(ValueError, match=r"train.lmdb:0 has 100 bytes, expected 3 s\^2 of raw RGB"):
        open_images(tmp_path, dataset="ffhq")[0]
    with pytest.raises(ValueError, match=r"train.lmdb:0 is no image of a known kind"):
        open_images(tmp_path, dataset="celeba_64")[0]
    write(tmp_path / "a" / "train.lmdb", {b"first": b"x"})
    with pytest.raises(ValueError, match="has 1 entries but none named 0"):
        open_images(tmp_path / "a", dataset="ffhq")[0]
    write(tmp_path / "b" / "train.lmdb", {})
    refused(tmp_path / "b", "train.lmdb is empty", dataset="ffhq")
    (tmp_path / "c" / "train.lmdb").mkdir(parents=True)
    refused(tmp_path / "c", "train.lmdb is not a readable LMDB", dataset="ffhq")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.lmdb").write_bytes(b"no database")
    refused(tmp_path / "d", "train.lmdb is not a readable LMDB", dataset="ffhq")
    save(tmp_path / "small" / "train" / "1.png", 64, 64, 3)
    save(tmp_path / "small" / "valid" / "1.png", 64, 64, 3)
    refused(tmp_path / "small", "1.png is 64x64", "needs at least 188x163", dataset="celeba_64")


def test_without_the_library(tmp_path, refused, monkeypatch):
    (tmp_path / "train.lmdb").mkdir()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    _environment.cache_clear()
    refused(tmp_path, "LMDBs need lmdb: pip install nvae_fast[data]", dataset="ffhq")


def put(data: bytearray, at: int, size: int, value: int) -> None:
    data[at : at + size] = value.to_bytes(size, "little")


def got(data: bytearray, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


@pytest.mark.parametrize(
    ("kind", "at", "size", "value", "words"),
    [
        ("meta", 16 + 24, 4, 4095, "pages of 4095 bytes"),
        ("meta", 16 + 120, 8, 0, "1 pages in use"),
        ("branch", 0, 8, 1, "page {} has a wrong head"),
        ("branch", 10, 2, 2, "page {} has a wrong head"),
        ("leaf", 12, 2, 4098, "page {} has a wrong head"),
        ("leaf", 14, 2, 4098, "page {} has a wrong head"),
        ("leaf", 16, 2, 4090, "page {} has a wrong node"),
        ("leaf", "size", 4, 2**31, "page {} has a wrong node"),
        ("leaf", "key", 2, 4000, "page {} has a wrong node"),
        ("leaf", "big", 8, 10**9, "page {} has a wrong node"),
        ("branch", "size", 4, 10**6, "level 1 leads to pages that are not there"),
    ],
)
def test_pages_that_would_kill_the_process(tmp_path, refused, kind, at, size, value, words):
    write(tmp_path / "train.lmdb", numbered([bytes(3 * 32 * 32)] * 500))
    path = tmp_path / "train.lmdb" / "data.mdb"
    assert fault(path) is None and len(open_images(tmp_path, dataset="imagenet_32", keep_small=False)) == 500
    _environment.cache_clear()
    data = bytearray(path.read_bytes())
    number = {"branch": 1, "leaf": 2}.get(kind)
    heads = [i for i in range(8192, len(data), 4096) if got(data, i, 8) == i // 4096 and got(data, i + 10, 2) == number]
    for start in heads or (0, 4096):
        node = start + got(data, start + 16, 2)
        named = {"size": node, "key": node + 6, "big": node + 8 + got(data, node + 6, 2)} if heads else {}
        put(data, named.get(at, start if isinstance(at, str) else start + at), size, value)
    path.write_bytes(data)
    found = fault(path)
    assert found in [words.format(start // 4096) for start in heads or (0,)]
    refused(tmp_path, f"train.lmdb is damaged ({found}): copy or build it again", dataset="imagenet_32")
