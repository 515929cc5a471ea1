"""Random numbers as a pure function of (seed, epoch, stream, image index).

An image gets the same numbers whatever the batch size, the rank, the number of threads and whatever was read before it:
that is what makes a resumed run see exactly the tensors of an uninterrupted one. The generator is SplitMix64 (Steele,
Lea and Flood, OOPSLA 2014), started at a hash of the four words; unlike numpy's `Generator` methods it cannot change
with a release.
"""

from __future__ import annotations

import numpy as np

SHUFFLE, FLIP, CROP, BINARIZE, SPLIT, STACK, SHARDS, WINDOW = range(8)  # streams: what the numbers are for

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, in place on a uint64 array."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def keys(seed: int, epoch: int, stream: int, index: np.ndarray) -> np.ndarray:
    """uint64 [B]: one well mixed key per image index [B]. Seed and epoch: any integers (-1: no epoch)."""
    h = np.zeros(1, np.uint64)
    for word in (seed, epoch, stream):
        h = _mix((h + _GOLDEN) ^ np.uint64(word & _MASK))
    return _mix((h + _GOLDEN) ^ np.asarray(index).astype(np.uint64))


def uniform(key: np.ndarray, count: int) -> np.ndarray:
    """float32 [B, count] in [0, 1), multiples of 2^-24: `count` numbers for every key [B]."""
    half = (count + 1) // 2  # one 64-bit word gives two numbers
    z = _mix(key[:, None] + np.arange(1, half + 1, dtype=np.uint64) * _GOLDEN)
    bits = z.astype("<u8", copy=False).view("<u4")[:, :count]
    return (bits >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def permutation(count: int, seed: int, epoch: int, stream: int) -> np.ndarray:
    """int64 [count]: a random order of 0..count-1."""
    return np.argsort(keys(seed, epoch, stream, np.arange(count)), kind="stable")
