"""Folders and zip archives of image files."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from nvae_fast.data import base, make_loader, open_images


@pytest.fixture
def ten(tmp_path, save) -> Path:
    for i in range(10):
        save(tmp_path / "set" / f"part{i % 2}" / f"{i}.png", 8, 6, 3, seed=i)
    return tmp_path / "set"


def zipped(folder: Path, wrap: str = "") -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, wrap + file.relative_to(folder).as_posix())
    return path


def as_set(source) -> set[bytes]:
    return {source[i].tobytes() for i in range(len(source))}


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("lazy", [False, True])
def test_a_seeded_split(ten, pixels, kind, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    path = zipped(ten) if kind == "zip" else ten
    train, valid = (open_images(path, split=s, valid_fraction=0.3) for s in ("train", "valid"))
    assert (len(train), len(valid)) == (7, 3) and (train.height, train.width, train.channels) == (8, 6, 3)
    assert (train.images is None) == lazy and train.name == path.name
    assert as_set(train) | as_set(valid) == {pixels(8, 6, 3, seed=i).tobytes() for i in range(10)}
    assert as_set(train).isdisjoint(as_set(valid))
    assert as_set(open_images(str(path), split="valid", valid_fraction=0.3)) == as_set(valid)
    others = [as_set(open_images(path, split="valid", valid_fraction=0.3, seed=s)) for s in range(1, 6)]
    assert any(other != as_set(valid) for other in others)
    assert next(iter(make_loader(train, 7, train=True, seed=0))).shape == (7, 3, 8, 6)
    assert len(open_images(path, split="valid", valid_fraction=0.01)) == 1
    assert len(open_images(path, split="train", valid_fraction=0.99)) == 1


@pytest.mark.parametrize("second", ["valid", "validation", "val", "test", "Test"])
@pytest.mark.parametrize("wrap", ["", "wrapped/"])
def test_split_folders(tmp_path, save, second, wrap):
    first = [save(tmp_path / "s" / "train" / "a" / f"{i}.png", 4, 4, seed=i) for i in range(3)]
    other = save(tmp_path / "s" / second / "x.png", 4, 4, seed=9)
    if not wrap:
        (tmp_path / "s" / "README.md").write_text("beside the splits")
    path = zipped(tmp_path / "s", wrap)
    for spec in (tmp_path / "s", path):
        train, valid = open_images(spec), open_images(spec, split="valid")
        assert np.array_equal(train.images[..., 0], first) and np.array_equal(valid[0][..., 0], other)
        assert train.channels == 1


def test_modes(tmp_path, pixels):
    grey = pixels(5, 5)
    alpha = np.full((5, 5), 255, np.uint8)
    alpha[0] = 0
    white = np.where(alpha == 0, 255, grey).astype(np.uint8)
    images = {
        "a.png": (Image.fromarray(grey), grey),
        "b.png": (Image.fromarray(grey > 99), (grey > 99) * 255),
        "c.png": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), white),
        "d.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey),
        "e.tif": (Image.fromarray(grey.astype(np.int32) * 257), grey),
        "f.pgm": (Image.fromarray(grey), grey),
    }
    (tmp_path / "train").mkdir()
    (tmp_path / "valid").mkdir()
    for name, (image, _) in images.items():
        image.save(tmp_path / "train" / name)
    Image.fromarray(grey).save(tmp_path / "valid" / "a.png")
    source = open_images(tmp_path)
    assert source.channels == 1
    for i, (name, (_, expected)) in enumerate(images.items()):
        assert np.array_equal(source[i][..., 0], expected), name
    colour = pixels(5, 5, 3, seed=1)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    rgba.save(tmp_path / "valid" / "b.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "valid" / "c.gif")
    valid = open_images(tmp_path, split="valid")
    assert np.array_equal(valid[0], np.dstack([grey] * 3))  # one coloured image makes all of the set coloured
    assert np.array_equal(valid[1], np.where(alpha[..., None] == 0, 255, colour))
    assert np.array_equal(valid[2], np.dstack([grey] * 3))
    assert open_images(tmp_path).channels == 3


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_exif_orientation_is_obeyed(tmp_path, save, pixels, suffix):
    save(tmp_path / ("a" + suffix), 12, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(6, 12, 3)).save(tmp_path / ("b" + suffix), exif=exif)
    sources = [open_images(tmp_path, split=s, valid_fraction=0.5) for s in ("train", "valid")]
    assert all((s.height, s.width) == (12, 6) for s in sources)
    with Image.open(tmp_path / ("b" + suffix)) as image:
        assert np.asarray(ImageOps.exif_transpose(image).convert("RGB")).tobytes() in set.union(*map(as_set, sources))


def test_image_size_brings_all_to_one_size(tmp_path, save):
    wide = save(tmp_path / "train" / "a.png", 8, 20, 3)
    save(tmp_path / "train" / "b.png", 33, 21, 3)
    save(tmp_path / "valid" / "a.png", 5, 5, 3)
    source = open_images(tmp_path, image_size=(8, 8))
    assert np.array_equal(source[0], wide[:, 6:14])  # no scaling: a centre crop
    assert open_images(tmp_path, image_size=(16, 24)).images.shape == (2, 16, 24, 3)
    assert open_images(tmp_path, split="valid", image_size=(16, 24)).images.shape == (1, 16, 24, 3)


def test_hidden_files_links_and_upper_case(ten, save, pixels):
    for name in (".DS_Store", "Thumbs.db", "part0/desktop.ini", ".hidden.txt"):
        (ten / name).write_bytes(b"x")
    save(ten / ".cache" / "z.png", 3, 3, 3)
    (ten / "part1" / "9.png").rename(ten / "part1" / "9.PNG")
    save(ten.parent / "elsewhere" / "e.png", 8, 6, 3, seed=77)
    os.symlink(ten.parent / "elsewhere", ten / "linked")
    os.symlink(ten, ten / "part0" / "loop")
    both = set.union(*(as_set(open_images(ten, split=s)) for s in ("train", "valid")))
    assert len(both) == 11 and pixels(8, 6, 3, seed=77).tobytes() in both


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def text(path: Path) -> None:
    path.write_text("no image\n")


def postscript(path: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 8\n%%EndComments\n%%EOF\n")


def another_size(path: Path) -> None:
    Image.new("RGB", (7, 9)).save(path)


def floating(path: Path) -> None:
    Image.fromarray(np.zeros((8, 6), np.float32)).save(path, "TIFF")


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("spoil", "name", "parts"),
    [
        (truncated, "part1/3.png", ["cannot be decoded", "truncated", "replace it or take it out"]),
        (text, "part1/3.png", ["is no image of a known kind"]),
        (postscript, "part1/3.png", ["is no image of a known kind"]),
        (text, "part0/notes.txt", ["is not an image: take it out"]),
        (another_size, "part1/3.png", ["is 9x7, expected 8x6 (height x width)", "use --image-size"]),
        (floating, "part1/3.png", ["floating-point pixels"]),
    ],
)
def test_a_bad_file_is_named(ten, refused, kind, spoil, name, parts):
    spoil(ten / name)
    path = zipped(ten) if kind == "zip" else ten
    shown = f"{path}:{name}" if kind == "zip" else str(ten / name)
    for split in ("train", "valid"):
        if spoil in (truncated, floating) and split == "valid":  # the header is fine: found where it is decoded
            continue
        refused(path, shown, *parts, split=split, valid_fraction=0.1, seed=1)


def test_a_truncated_file_of_a_lazy_source_is_named_by_the_loader(ten, monkeypatch):
    truncated(ten / "part1" / "3.png")
    monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    source = open_images(ten, valid_fraction=0.1, seed=1, max_corrupt=0)
    with pytest.raises(ValueError, match=r"part1/3\.png cannot be decoded"):
        list(make_loader(source, 3, train=False, seed=0))
    (ten / "part1" / "5.png").unlink()
    (ten / "part1" / "3.png").unlink()
    with pytest.raises(ValueError, match=r"cannot read .*part1/3\.png: No such file"):
        list(make_loader(source, 3, train=False, seed=0))


def test_empty_sets_and_wrong_kinds(tmp_path, save, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no images in", str(tmp_path / "empty"), "*.png")
    save(tmp_path / "one" / "a.png", 4, 4)
    refused(tmp_path / "one", "1 image(s), at least 2")
    refused(tmp_path / "one" / "a.png", "expected a folder of images", "give the folder it lies in")
    refused(tmp_path / "one" / "a.png", "is a file, expected a folder", dataset="folder")
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 nothing")
    refused(tmp_path / "bad.zip", "bad.zip is not a readable zip archive")
    refused(tmp_path / "one", "Is a directory", dataset="zip")
    for name in ("b.txt", "c.csv"):
        (tmp_path / "one" / name).write_text("")
    refused(tmp_path / "one", "b.txt is not an image (and 1 more such files)")


@pytest.mark.parametrize("factor", [1.5, 3])
def test_images_above_pillows_limit_are_refused(ten, refused, monkeypatch, recwarn, factor):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(8 * 6 / factor))
    refused(ten, "part0/0.png has over", "Pillow's limit")
    assert not recwarn.list


def test_an_encrypted_or_damaged_member_is_named(ten, refused):
    path = zipped(ten)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"part0/0.png") - 46 + 8] |= 1  # the flag "encrypted" of its entry in the directory
    path.write_bytes(content)
    refused(path, "part0/0.png cannot be decoded", "encrypted")
