from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_fast.data import open_images
from nvae_fast.errors import InputError


@pytest.fixture
def pixels() -> Callable[..., np.ndarray]:
    """pixels(3, 8, 8): uint8 noise of a shape, the same for the same seed."""
    return lambda *shape, seed=0: np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def save(pixels) -> Callable[..., np.ndarray]:
    """save(path, 8, 8, 3): writes a noise image of that shape, in the format of the suffix; gives its pixels."""

    def write(path: Path, *shape: int, seed: int = 0) -> np.ndarray:
        array = pixels(*shape, seed=seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        return array

    return write


@pytest.fixture
def refused() -> Callable[..., str]:
    """refused(spec, "part", ..., dataset=...): opening fails with one line that holds all the parts; gives the line."""

    def check(spec: object, *parts: str, **options) -> str:
        options = {"max_corrupt": 0} | options
        with pytest.raises(InputError) as caught:
            open_images(spec, **options)
        line = str(caught.value)
        assert "\n" not in line
        for part in parts:
            assert part in line, line
        return line

    return check
