"""Glow's TFRecords, read without TensorFlow.

A record is: its length (uint64), the masked CRC-32C of those eight bytes, the bytes, their masked CRC-32C, all little-endian.
Its bytes are a protocol buffer of which `tf.train.Example` defines this much: Example.features = 1, Features.feature = 1 (a map
entry with key = 1 and value = 2), Feature.bytes_list = 1, Feature.int64_list = 3, and in both lists value = 1. Glow's examples
hold `shape` (three int64: height, width, channels) and `data` (that many bytes).

Which files: those named *.tfrecords or *.tfrecord, at any depth, with folders `train` and `validation` for the splits (see
folder.py). Glow keeps one set per resolution 2^R, told apart by `-rR-` in their names: the one of the size asked for is read,
else the largest.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import InputError
from .base import ImageSource, LazySource, Request, first_shape, keep_small
from .corrupt import Corrupt, CorruptImage
from .crc32c import masked
from .decode import MAX_FILE
from .folder import Folder, split_names

SUFFIXES = (".tfrecords", ".tfrecord")


def read_tfrecords(request: Request) -> ImageSource:
    """The images of a folder of TFRecords, or of one file."""
    names = _files(request)
    places = [(path, offset, length) for path in names for offset, length in index(path)]
    if not places:
        raise InputError(f"{request.path}: the TFRecords of the {request.split} part are empty")

    def label(i: int) -> str:
        path, offset, _ = places[i]
        return f"{path} (record at byte {offset - 12})"

    def read(i: int) -> np.ndarray:
        path, offset, length = places[i]
        with open(path, "rb") as stream:
            stream.seek(offset)
            content = stream.read(length + 4)
        if len(content) != length + 4 or struct.unpack("<I", content[length:])[0] != masked(content[:length]):
            raise CorruptImage(f"{label(i)} is damaged (its CRC differs): fetch the file again")
        return image(content[:length], label(i))

    corrupt = Corrupt(request.max_corrupt)
    height, width, channels = first_shape(len(places), read, label, corrupt)
    size = request.transform.size or (height, width)
    source = LazySource(request.name, len(places), (*size, channels), read, label, request.transform, corrupt)
    return keep_small(source) if request.keep_small else source


def _files(request: Request) -> list[Path]:
    if request.path.is_file():
        raise InputError(f"{request.path} is one file: give --data the folder with the files of train and validation")
    names = [name for name in Folder(request.path).names if name.lower().endswith(SUFFIXES)]
    if not names:
        raise InputError(f"no TFRecords in {request.path}: expected files named *{' or *'.join(SUFFIXES)}")
    found = {name: re.search(r"-r(\d\d)-", name) for name in names}
    scales = {int(match[1]) for match in found.values() if match}
    if scales:
        size = request.transform.size
        asked = math.log2(size[0]) if size and size[0] == size[1] else None
        scale = asked if asked in scales else max(scales)
        names = [name for name, match in found.items() if match and int(match[1]) == scale]
    pair = split_names(sorted(names))
    if pair is None:
        raise InputError(f"{request.path} has no folders train and validation of TFRecords: give the folder that holds both")
    return [request.path / name for name in pair[0 if request.split == "train" else 1]]


def index(path: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of the bytes of every record of a file; their CRCs are left for later."""
    size = os.path.getsize(path)
    at = 0
    with open(path, "rb") as stream:
        while at < size:
            head = stream.read(12)
            where = f"{path} (record at byte {at})"
            if len(head) < 12:
                raise InputError(f"{where} is cut off: fetch the file again")
            length, crc = struct.unpack("<QI", head)
            if crc != masked(head[:8]):
                raise InputError(f"{where} does not start with a length and its CRC: not a TFRecord, or damaged")
            if length > min(size - at - 16, MAX_FILE):
                raise InputError(f"{where} says that it has {length} bytes, the file has {size - at - 16}: fetch it again")
            yield at + 12, length
            at += length + 16
            stream.seek(at)


def image(content: bytes, label: str) -> np.ndarray:
    """uint8 [H,W,C] of one of Glow's examples."""
    try:
        features = {}
        for feature in _all(_one(content, 1), 1):
            key, value = _one(feature, 1), _one(feature, 2)
            if key in (b"shape", b"data"):
                features[key] = value
        shape = _integers(_one(features[b"shape"], 3))
        data = _one(_one(features[b"data"], 1), 1)
    except (KeyError, ValueError) as error:
        raise CorruptImage(f"{label} is no example with 'shape' and 'data' ({error}): are these Glow's files?") from None
    if len(shape) != 3 or shape[2] not in (1, 3) or min(shape) < 1 or math.prod(shape) != len(data):
        raise CorruptImage(
            f"{label} has shape {shape} and {len(data)} bytes, expected (height, width, 1 or 3) and as many bytes"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """(value, place behind it)."""
    value = 0
    for i in range(10):
        if at + i >= len(content):
            raise ValueError("cut off")
        value |= (content[at + i] & 127) << 7 * i
        if content[at + i] < 128:
            return value, at + i + 1
    raise ValueError("a number of over 10 bytes")


def _all(message: bytes, number: int) -> Iterator[bytes]:
    """The length-delimited values of a field."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, end = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            end = at + length
        elif kind in (1, 5):
            end = at + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if end > len(message):
            raise ValueError("cut off")
        if tag >> 3 == number and kind == 2:
            yield message[at:end]
        at = end


def _one(message: bytes, number: int) -> bytes:
    found = next(_all(message, number), None)
    if found is None:
        raise ValueError(f"no field {number}")
    return found


def _integers(message: bytes) -> tuple[int, ...]:
    """The int64 values (field 1) of an Int64List, packed or not."""
    packed = next(_all(message, 1), None)
    out, at = [], 0
    while at < len(message if packed is None else packed) and len(out) < 8:
        if packed is None:
            tag, at = _varint(message, at)
            if tag != 8:
                raise ValueError(f"tag {tag} in a list of integers")
        value, at = _varint(message if packed is None else packed, at)
        out.append(value)
    return tuple(out)
