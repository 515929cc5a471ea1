from __future__ import annotations

import io
import tarfile
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


SIZES = (5, 9, 3, 7, 6, 1, 8)


def write_shard(path: Path, images, kind: str = "PNG", extra: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:

        def add(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for i, image in enumerate(images):
            if isinstance(image, bytes):
                content = image
            else:
                stream = io.BytesIO()
                Image.fromarray(image).save(stream, kind)
                content = stream.getvalue()
            if extra:
                add(f"sub/{i:03}.cls", b"7")
            add(f"sub/{i:03}.{kind.lower()}", content)
            if extra:
                add(f"sub/{i:03}.json", b"{}")


@pytest.fixture
def shard() -> Callable[..., None]:
    """shard(path, images): a tar of samples with an image each; bytes instead of pixels are written as they are."""
    return write_shard


@pytest.fixture
def numbered(pixels) -> np.ndarray:
    """60 images 5x4x3, their numbers in the first pixels of both sides."""
    images = pixels(60, 5, 4, 3)
    images[:, 0, 0] = images[:, 0, -1] = np.arange(60)[:, None]
    return images


@pytest.fixture
def folder(tmp_path, numbered) -> Path:
    """train-000.tar ... train-006.tar with images 0 to 38, val-0.tar and val-1.tar with 39 to 48."""
    at = 0
    for i, n in enumerate(SIZES):
        write_shard(tmp_path / "s" / f"train-{i:03}.tar", numbered[at : at + n])
        at += n
    write_shard(tmp_path / "s" / "val-0.tar", numbered[39:43])
    write_shard(tmp_path / "s" / "val-1.tar", numbered[43:49])
    return tmp_path / "s"
