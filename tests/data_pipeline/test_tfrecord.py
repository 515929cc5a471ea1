"""Glow's TFRecords: framing, checksums, the protocol buffer, resolutions and splits."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from nvae_fast.data import crc32c as crc_module
from nvae_fast.data import open_images
from nvae_fast.data.tfrecord import image
from nvae_fast.errors import InputError


def crc32c(content: bytes) -> int:
    """Bit by bit, from the definition."""
    state = 0xFFFFFFFF
    for byte in content:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def masked(content: bytes) -> bytes:
    value = crc32c(content)
    return struct.pack("<I", ((value >> 15 | value << 17) + 0xA282EAD8) % 2**32)


def record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + masked(length) + content + masked(content)


def varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def part(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def integers(values, packed: bool) -> bytes:
    body = part(1, b"".join(map(varint, values))) if packed else b"".join(b"\x08" + varint(v) for v in values)
    return part(3, body)


def example(pixels: np.ndarray, *, packed: bool = True, shape=None) -> bytes:
    features = {
        b"label": integers([0], packed),
        b"shape": integers(pixels.shape if shape is None else shape, packed),
        b"data": part(1, part(1, pixels.tobytes())),
    }
    return part(1, b"".join(part(1, part(1, key) + part(2, value)) for key, value in features.items()))


def write(path: Path, images, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(record(example(x, **options)) for x in images))


@pytest.fixture
def glow(tmp_path, pixels) -> Path:
    for scale, count in ((3, 5), (4, 4)):
        images = pixels(count, 2**scale, 2**scale, 3, seed=scale)
        write(tmp_path / "train" / f"train-r0{scale}-s-0000-of-0002.tfrecords", images[:2])
        write(tmp_path / "train" / f"train-r0{scale}-s-0001-of-0002.tfrecords", images[2:], packed=False)
        write(tmp_path / "validation" / f"validation-r0{scale}-s-0000-of-0001.tfrecords", images[:1])
    return tmp_path


def test_the_images_of_a_resolution(glow, pixels):
    source = open_images(glow)
    assert np.array_equal(source.images.numpy(), pixels(4, 16, 16, 3, seed=4)) and source.name == glow.name
    small = open_images(glow, image_size=(8, 8))
    assert np.array_equal(small.images.numpy(), pixels(5, 8, 8, 3, seed=3))
    lazy = open_images(glow, image_size=(8, 8), keep_small=False)
    assert lazy.images is None and np.array_equal(lazy[3], pixels(5, 8, 8, 3, seed=3)[3])
    assert len(open_images(glow, split="valid")) == 1
    assert open_images(glow, dataset="imagenet_32")[0].shape == (32, 32, 3)  # treated as ImageNet-32, scaled up


def test_crc32c(monkeypatch):
    assert crc_module.crc32c(b"123456789") == 0xE3069283
    for n in (0, 1, 8, 63, 64, 65, 127, 128, 1000, 4099, 70_001):
        content = np.random.default_rng(n).bytes(n)
        assert crc_module._numpy(content) == crc32c(content), n
    crc_module._implementation.cache_clear()
    monkeypatch.setitem(sys.modules, "google_crc32c", type(sys)("google_crc32c"))
    sys.modules["google_crc32c"].value = lambda content: 7
    assert crc_module.crc32c(b"") == 7
    crc_module._implementation.cache_clear()


def first(folder: Path) -> Path:
    return folder / "train" / "train-r04-s-0000-of-0002.tfrecords"


def test_damage_is_named(glow, refused):
    path, content = first(glow), first(glow).read_bytes()
    size = len(content) // 2

    def spoilt(new: bytes, *parts: str) -> None:
        path.write_bytes(new)
        refused(glow, str(path), *parts)

    for at in (size + 40, 2 * size - 1):
        spoilt(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], f"record at byte {size}", "its CRC differs")
    spoilt(content[:size] + b"\x01" + content[size + 1 :], f"record at byte {size}", "length and its CRC")
    spoilt(content[:-1], f"record at byte {size}", "fetch it again")
    spoilt(content[: size + 11], f"record at byte {size}", "is cut off")
    huge = struct.pack("<Q", 2**63)
    spoilt(huge + masked(huge), "says that it has 9223372036854775808 bytes, the file has")
    for at in (40, size + 40):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert len(open_images(glow, max_corrupt=1)) == 3  # one damaged record is passed over


def test_messages_that_are_none(pixels):
    good = example(pixels(4, 4, 3))
    assert np.array_equal(image(good, "x"), pixels(4, 4, 3))
    wrong = [example(pixels(4, 4, 3), shape=s) for s in ((4, 4), (4, 4, 4), (3, 4, 4), (0, 4, 3), (2**40, 2**40, 3))]
    for content in (b"", b"\xff" * 30, good[:-1], good[: len(good) // 2], part(1, b""), *wrong):
        with pytest.raises(InputError, match="^x (is no example|has shape)") as caught:
            image(content, "x")
        assert "\n" not in str(caught.value)
    generator = np.random.default_rng(0)
    for _ in range(2000):  # anything but an image is one of these errors
        broken = bytearray(good)
        broken[generator.integers(60)] = generator.integers(256)
        try:
            assert image(bytes(broken), "x").size == 48
        except InputError as error:
            assert str(error).startswith("x ")


def test_folders_that_are_none(tmp_path, refused, pixels):
    refused(tmp_path, "no TFRecords in", dataset="tfrecord")
    write(tmp_path / "a.tfrecords", [pixels(4, 4, 3)])
    refused(tmp_path, "no folders train and validation")
    refused(tmp_path / "a.tfrecords", "is one file: give --data the folder", dataset="tfrecord")
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "a.tfrecords").write_bytes(b"")
    write(tmp_path / "validation" / "a.tfrecords", [pixels(4, 4, 3)])
    (tmp_path / "a.tfrecords").unlink()
    refused(tmp_path, "TFRecords of the train part are empty")
