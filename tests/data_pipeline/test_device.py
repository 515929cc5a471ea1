"""What a GPU makes of a batch, run on the CPU: bit for bit what the CPU's loader gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nvae_fast.data import base, make_loader, open_images
from nvae_fast.data import device as device_module
from nvae_fast.data import loader as loader_module
from nvae_fast.data.base import MemorySource
from nvae_fast.data.measure import images_per_second
from nvae_fast.data.rng import BINARIZE, keys, uniform


def on_device(loader):
    """The batches as a GPU would make them."""
    tasks = loader._tasks(loader._epoch if loader.train else -1, loader._start)
    raws = loader._worked(tasks, lambda task: loader._raw(task, loader._epoch if loader.train else -1))
    return device_module.upload(raws, torch.device("cpu"), loader._padding)


@pytest.mark.parametrize("shape", [(6, 5, 1), (7, 4, 3), (3, 3, 4)])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("binarize", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_batches_are_those_of_the_cpu(pixels, shape, flip, binarize, train):
    source = MemorySource("m", pixels(50, *shape))
    loader = make_loader(source, 8, train=train, seed=3, padding=2, flip=flip, binarize=binarize)
    loader.set_epoch(4, 1)
    expected, got = list(loader), list(on_device(loader))
    assert len(expected) == len(got) == len(loader) - 1
    for x, y in zip(expected, got, strict=True):
        assert torch.equal(x, y) and y.dtype == torch.float32
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("count", [1, 2, 7, 3072])
def test_the_generator(count):
    key = keys(1, 2, BINARIZE, np.arange(100))
    ours = device_module.uniform(torch.from_numpy(key.view(np.int64)), count)
    assert np.array_equal(ours.numpy(), uniform(key, count))


def test_every_level():
    table = device_module.levels(torch.device("cpu")).numpy()
    assert np.array_equal(table, np.divide(np.arange(256, dtype=np.uint8), 255, dtype=np.float32))


def test_the_loader_takes_that_path_for_a_device(pixels, monkeypatch):
    seen = []
    monkeypatch.setattr(
        loader_module, "upload", lambda raws, device, padding: seen.append((device.type, padding)) or list(raws)
    )
    loader = make_loader(MemorySource("m", pixels(8, 4, 4, 3)), 4, train=True, seed=0, padding=1, device=torch.device("cuda"))
    assert [raw.images.dtype for raw in loader] == [np.uint8] * 2 and seen == [("cuda", 1)]
    loader = make_loader(MemorySource("m", pixels(8, 4, 4, 3)), 4, train=True, seed=0, device=torch.device("cpu"))
    assert [x.dtype for x in loader] == [torch.float32] * 2 and len(seen) == 1


def test_lazy_sources_and_their_measure(tmp_path, save, monkeypatch):
    monkeypatch.setattr(base, "MEMORY_LIMIT", 0)
    for i in range(10):
        save(tmp_path / f"{i}.png", 8, 8, 3, seed=i)
    loader = make_loader(open_images(tmp_path), 3, train=True, seed=0, flip=True, workers=2)
    assert all(torch.equal(x, y) for x, y in zip(loader, on_device(loader), strict=True))
    assert images_per_second(loader, seconds=0.01) > 0
