"""CRC-32C (Castagnoli), with which TFRecords are checked: google-crc32c where it is installed, else numpy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

_POLYNOMIAL = 0x82F63B78  # 0x1EDC6F41, bits reversed


@cache
def _table() -> np.ndarray:
    """uint32 [256]: the state after one byte, from a state that is that byte."""
    state = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        state = (state >> np.uint32(1)) ^ np.where(state & 1, np.uint32(_POLYNOMIAL), np.uint32(0))
    return state


@cache
def _zeros(length: int) -> np.ndarray:
    """uint32 [4, 256]: what each byte of a state becomes after `length` (a power of two) zero bytes; the four add up by xor."""
    places = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    if length == 1:
        return _table()[places & 255] ^ (places >> np.uint32(8))
    half = _zeros(length // 2)
    return _advance(half, _advance(half, places))


def _advance(tables: np.ndarray, state: np.ndarray) -> np.ndarray:
    return (
        tables[0][state & 255] ^ tables[1][(state >> np.uint32(8)) & 255]
        ^ tables[2][(state >> np.uint32(16)) & 255] ^ tables[3][state >> np.uint32(24)]
    )  # fmt: skip


def _numpy(content: bytes) -> int:
    """The message is cut into lanes of one power-of-two length, which advance together and are then joined in pairs.

    Zero bytes in front change nothing (the state there is 0), so the message is filled up in front; the usual start of all
    ones is the same as inverting the first four bytes.
    """
    if len(content) < 64:
        table, state = _list(), 0xFFFFFFFF
        for byte in content:
            state = table[(state ^ byte) & 255] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    length = 1 << max(2, (len(content).bit_length() - 4) // 2)
    lanes = 1 << (-(-len(content) // length) - 1).bit_length()
    filled = np.zeros(lanes * length, np.uint8)
    start = len(filled) - len(content)
    filled[start:] = np.frombuffer(content, np.uint8)
    filled[start : start + 4] ^= 255
    columns = np.ascontiguousarray(filled.reshape(lanes, length).T)
    table, state = _table(), np.zeros(lanes, np.uint32)
    for column in columns:
        state = table[(state ^ column) & 255] ^ (state >> np.uint32(8))
    while len(state) > 1:
        state = _advance(_zeros(length), state[0::2]) ^ state[1::2]
        length *= 2
    return int(state[0]) ^ 0xFFFFFFFF


@cache
def _list() -> list[int]:
    return _table().tolist()


@cache
def _implementation() -> Callable[[bytes], int]:
    try:
        from google_crc32c import value
    except ImportError:
        return _numpy
    return value


def crc32c(content: bytes) -> int:
    """The CRC-32C of bytes: 0xE3069283 for b"123456789"."""
    return _implementation()(content)


def masked(content: bytes) -> int:
    """TFRecord's masked form of it: rotated right by 15 bits, plus 0xA282EAD8."""
    value = crc32c(content)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF
