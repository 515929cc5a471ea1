"""Unreadable images: named, passed over up to a limit, never counted twice; and what pixels odd modes give."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_fast.data import base, make_loader, open_images
from nvae_fast.data import decode as decode_module
from nvae_fast.errors import InputError


@pytest.fixture
def spoiled(tmp_path, save) -> Path:
    """train/0.png to 11.png, of which 3, 4 and 9 are unreadable; valid/0.png to 3.png, of which 1 is."""
    for split, count, bad in (("train", 12, (3, 4, 9)), ("valid", 4, (1,))):
        for i in range(count):
            path = tmp_path / split / f"{i:02}.png"
            save(path, 8, 6, 3, seed=i)
            if i in bad:
                path.write_bytes(path.read_bytes()[:100])  # a whole header, half of the pixels
    return tmp_path


def test_a_set_in_memory_leaves_them_out(spoiled, pixels, caplog):
    source = open_images(spoiled, max_corrupt=3)
    kept = [i for i in range(12) if i not in (3, 4, 9)]
    assert np.array_equal(source.images.numpy(), np.stack([pixels(8, 6, 3, seed=i) for i in kept]))
    lines = sorted(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert len(lines) == 3 and all("of at most 3" in line and "cannot be decoded" in line for line in lines)
    assert [any(name in line for line in lines) for name in ("03.png", "04.png", "09.png", "05.png")] == [True] * 3 + [False]
    with pytest.raises(InputError, match=r"more than 2 images cannot be read .*\d\d\.png.* or allow more with --max-corrupt"):
        open_images(spoiled, max_corrupt=2)
    with pytest.raises(InputError, match=r"0[34]\.png cannot be decoded|09\.png cannot be decoded"):
        open_images(spoiled, max_corrupt=0)
    with pytest.raises(InputError, match="--max-corrupt is -1"):
        open_images(spoiled, max_corrupt=-1)


@pytest.mark.parametrize("workers", [1, 3])
def test_in_training_the_next_readable_image_takes_the_place(spoiled, pixels, workers, monkeypatch):
    monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    source = open_images(spoiled)
    assert source.images is None and len(source) == 12
    seen = {i: {3: 5, 4: 5, 9: 10}.get(i, i) for i in range(12)}
    index = np.array([3, 0, 4, 9, 11])
    rows = source.batch(index, replace=True)
    assert np.array_equal(rows.images, np.stack([pixels(8, 6, 3, seed=seen[i]) for i in index]))
    loader = make_loader(source, 1, train=True, seed=4, workers=workers)
    again = make_loader(open_images(spoiled), 1, train=True, seed=4, workers=workers)
    again.set_epoch(0, 5)
    assert len(loader) == 12 and all(torch.equal(a, b) for a, b in zip(list(loader)[5:], again, strict=True))


def test_an_evaluation_counts_nothing_twice(spoiled, pixels, monkeypatch):
    monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    for batch in (1, 3, 4):
        source = open_images(spoiled, split="valid")
        batches = list(make_loader(source, batch, train=False, seed=0, binarize=False))
        assert all(len(x) for x in batches)
        got = (torch.cat(batches) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(got, np.stack([pixels(8, 6, 3, seed=i) for i in (0, 2, 3)]))
    with pytest.raises(InputError, match="01.png cannot be decoded"):
        list(make_loader(open_images(spoiled, split="valid", max_corrupt=0), 2, train=False, seed=0))


def test_a_header_that_cannot_be_read_does_not_move_the_split(tmp_path, save):
    for i in range(10):
        save(tmp_path / f"{i}.png", 4, 4, seed=i)
    before = {open_images(tmp_path, split=s, valid_fraction=0.5)[i].tobytes() for s in ("valid",) for i in range(5)}
    for i in range(10):  # whichever splits they are in
        if i % 3 == 0:
            (tmp_path / f"{i}.png").write_bytes(b"no image")
    train, valid = (open_images(tmp_path, split=s, valid_fraction=0.5) for s in ("train", "valid"))
    assert len(train) + len(valid) == 6
    assert {x.tobytes() for x in valid.images.numpy()} <= before
    with pytest.raises(InputError, match="more than 3 images cannot be read"):
        open_images(tmp_path, max_corrupt=3)


def test_nothing_readable(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 3 images can be read"):
        open_images(tmp_path)


def test_with_a_size_only_the_headers_up_to_the_first_colour_image_are_read(tmp_path, save, monkeypatch):
    from nvae_fast.data import folder

    monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    for i in range(3000):
        (tmp_path / f"{i:04}.png").write_bytes(b"")
    save(tmp_path / "0000.png", 5, 7, 3)
    looked = []
    monkeypatch.setattr(folder, "head", lambda *a: looked.append(a[1]) or decode_module.head(*a))
    assert open_images(tmp_path, image_size=(4, 4), max_corrupt=2000).channels == 3
    assert len(looked) == 1024


def noise(pixels, mode: str) -> tuple[bytes, np.ndarray]:
    """(file, expected pixels) of one image in a mode."""
    rgb, grey = pixels(6, 5, 3), pixels(6, 5)
    stream, options = io.BytesIO(), {}
    expected = rgb
    if mode == "palette with transparency":
        image = Image.fromarray((grey > 128).astype(np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        options = {"format": "PNG", "transparency": 0}
        expected = np.where((grey > 128)[..., None], np.uint8([200, 100, 50]), np.uint8(255))
    elif mode == "CMYK":
        image = Image.fromarray(rgb).convert("CMYK")
        options, expected = {"format": "TIFF"}, np.asarray(image.convert("RGB"))
    elif mode == "CMYK JPEG":
        image = Image.new("CMYK", (5, 6), (0, 255, 255, 0))
        options, expected = {"format": "JPEG"}, np.tile(np.uint8([255, 0, 0]), (6, 5, 1))
    elif mode == "16-bit colour":
        return sixteen_bit_png(rgb), rgb
    else:
        assert mode == "grey among colour"
        image, options, expected = Image.fromarray(grey), {"format": "PNG"}, np.dstack([grey] * 3)
    image.save(stream, **options)
    return stream.getvalue(), expected


def sixteen_bit_png(rgb: np.ndarray) -> bytes:
    """A PNG whose upper bytes are rgb; written by hand, Pillow writes none."""
    import struct
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = rgb.shape
    wide = np.stack([rgb, np.full_like(rgb, 200)], -1).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in wide)
    head = struct.pack(">2I5B", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["palette with transparency", "CMYK", "CMYK JPEG", "16-bit colour", "grey among colour"])
def test_odd_modes(tmp_path, pixels, save, mode):
    content, expected = noise(pixels, mode)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "b.png").write_bytes(content)
    save(tmp_path / "train" / "a.png", 6, 5, 3)
    save(tmp_path / "valid" / "a.png", 6, 5, 3)
    got = open_images(tmp_path)[1].astype(int)
    assert np.abs(got - expected).max() <= (2 if "JPEG" in mode else 0)


def test_celebas_list_of_splits_is_obeyed(tmp_path, save, pixels, refused):
    for i in range(6):
        save(tmp_path / "img_align_celeba" / f"{i:06}.png", 4, 4, 3, seed=i)
    listed = tmp_path / "list_eval_partition.txt"
    listed.write_text("".join(f"{i:06}.png {which}\n" for i, which in enumerate("001120")))
    with zipfile.ZipFile(tmp_path.with_suffix(".zip"), "w") as archive:
        for file in tmp_path.rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path).as_posix())
    for path in (tmp_path, tmp_path.with_suffix(".zip")):
        train, valid = open_images(path), open_images(path, split="valid")
        assert np.array_equal(train.images.numpy(), np.stack([pixels(4, 4, 3, seed=i) for i in (0, 1, 5)]))
        assert np.array_equal(valid.images.numpy(), np.stack([pixels(4, 4, 3, seed=i) for i in (2, 3)]))
    listed.write_text("000000.png 0\n")
    refused(tmp_path, "list_eval_partition.txt does not list img_align_celeba/000001.png")
    listed.write_text("".join(f"{i:06}.png 0\n" for i in range(6)))
    refused(tmp_path, "leaves 6 images to train and 0 to validate")
