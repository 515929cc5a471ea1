"""Batches: what they hold, and that they depend on (seed, epoch, image index) only."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from nvae_fast.data import base as base_module
from nvae_fast.data import make_loader, open_images
from nvae_fast.data.base import LazySource, MemorySource
from nvae_fast.data.rng import FLIP, SHUFFLE, keys, permutation, uniform
from nvae_fast.data.transforms import Transform
from nvae_fast.errors import InputError

RANDOM = {"train": True, "seed": 3, "padding": 2, "flip": True, "binarize": True}


@pytest.fixture
def numbered(pixels):
    """50 images 6x5x3; the first pixel of each is its index, on both sides, so that a flip keeps it."""
    images = pixels(50, 6, 5, 3)
    images[:, 0, 0] = images[:, 0, -1] = np.arange(50)[:, None]
    return images


def lazily(images: np.ndarray, read=None) -> LazySource:
    return LazySource("lazy", len(images), images.shape[1:], read or (lambda i: images[i]), lambda i: f"image {i}", Transform())


def indices(batches) -> np.ndarray:
    return np.concatenate([(x[:, 0, 0, 0] * 255).round().int().numpy() for x in batches])


def rows(loader, epoch: int = 0, start: int = 0) -> torch.Tensor:
    loader.set_epoch(epoch, start)
    return torch.cat(list(loader))


def test_the_demo_set():
    train, valid = open_images("demo", split="train"), open_images("demo", split="valid")
    assert (len(train), len(valid)) == (9000, 1000)
    assert (train.name, train.height, train.width, train.channels) == ("demo", 28, 28, 1)
    assert train.images.dtype == torch.uint8 and train.images.shape == (9000, 28, 28, 1)
    assert train[0].dtype == np.uint8 and train[0].shape == (28, 28, 1)
    assert 60 < train.images.float().mean() < 85
    assert "MemorySource('demo', 9000 images, 28x28x1)" == repr(train)
    loader = make_loader(valid, 300, train=False, seed=0, padding=2)
    batches = list(loader)
    assert [len(x) for x in batches] == [300, 300, 300, 100] and len(loader) == 4
    assert all(x.dtype == torch.float32 and x.is_contiguous() and x.shape[1:] == (1, 32, 32) for x in batches)
    assert torch.equal(torch.cat(batches)[:, 0, 2:-2, 2:-2], valid.images[..., 0].float() / 255)
    assert torch.cat(batches)[:, :, :2].sum() == 0 and torch.cat(batches)[..., -2:].sum() == 0


def test_training_order(numbered):
    loader = make_loader(MemorySource("m", numbered), 8, train=True, seed=1)
    assert len(loader) == 6
    first, second = (indices(rows(loader, epoch).split(8)) for epoch in (0, 1))
    assert len(set(first)) == len(set(second)) == 48 and not np.array_equal(first, second)
    assert np.array_equal(first, indices(rows(loader, 0).split(8)))
    other = indices(make_loader(MemorySource("m", numbered), 8, train=True, seed=2))
    assert not np.array_equal(first, other)


def test_a_memory_and_a_lazy_source_give_the_same_batches(numbered):
    before = threading.active_count()
    expected = rows(make_loader(MemorySource("m", numbered), 8, **RANDOM), 4)
    for workers in (0, 1, 3):
        assert torch.equal(rows(make_loader(lazily(numbered), 8, **RANDOM, workers=workers), 4), expected)
    assert threading.active_count() == before
    assert expected.is_contiguous() and set(expected.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("lazy", [False, True])
def test_a_resumed_epoch_gives_the_same_batches(numbered, lazy):
    source = lazily(numbered) if lazy else MemorySource("m", numbered)
    whole = make_loader(source, 8, **RANDOM)
    whole.set_epoch(2)
    batches = list(whole)
    again = make_loader(source, 8, **RANDOM)
    again.set_epoch(2, start_batch=4)
    assert all(torch.equal(a, b) for a, b in zip(again, batches[4:], strict=True))
    assert len(again) == 6
    again.set_epoch(2, start_batch=6)
    assert list(again) == []
    with pytest.raises(ValueError, match="start_batch is 7, expected 0 to 6"):
        again.set_epoch(0, 7)


def test_random_numbers_do_not_depend_on_batch_size(numbered):
    source = MemorySource("m", numbered)
    one = rows(make_loader(source, 16, **RANDOM), 5)
    assert torch.equal(rows(make_loader(source, 4, **RANDOM), 5)[:48], one)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("lazy", [True, False])
def test_processes_together_see_the_batches_of_one(numbered, world, batch, train, lazy):
    source = lazily(numbered) if lazy else MemorySource("m", numbered)
    options = RANDOM | {"train": train}
    one = make_loader(source, world * batch, **options)
    ranks = [make_loader(source, batch, **options, rank=r, world=world) for r in range(world)]
    for epoch, start in ((0, 0), (3, 1)):
        for loader in (one, *ranks):
            loader.set_epoch(epoch, min(start, len(loader)))
        expected, parts = list(one), [list(rank) for rank in ranks]
        assert [len(p) for p in parts] == [max(len(rank) - start, 0) for rank in ranks]
        assert not train or len({len(rank) for rank in ranks} | {len(one)}) == 1
        assert not train or {len(x) for part in parts for x in part} <= {batch}
        for t, whole in enumerate(expected):
            assert torch.equal(torch.cat([part[t] for part in parts if t < len(part)]), whole)


def test_validation_is_in_order_and_fixed(numbered):
    source = MemorySource("m", numbered)
    options = {"train": False, "seed": 3, "flip": True}
    assert np.array_equal(indices(make_loader(source, 8, **options)), np.arange(50))
    plain = rows(make_loader(source, 8, **options))
    assert torch.equal(plain, source.images.permute(0, 3, 1, 2).float() / 255)  # never flipped
    drawn = rows(make_loader(source, 8, **options, binarize=True))
    assert torch.equal(drawn, rows(make_loader(source, 50, **options, binarize=True), epoch=7))
    assert not torch.equal(drawn, rows(make_loader(source, 8, train=False, seed=4, binarize=True)))


@pytest.mark.parametrize(("count", "world"), [(50, 3), (2, 3), (7, 2), (8, 2)])
def test_validation_ranks_count_every_image_once(numbered, count, world):
    source = MemorySource("m", numbered)
    loaders = [make_loader(source, 4, train=False, seed=0, rank=r, world=world, limit=count) for r in range(world)]
    seen = [indices(loader) if len(loader) else np.array([], int) for loader in loaders]
    assert sorted(np.concatenate(seen).tolist()) == list(range(count))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1
    assert [len(loader) for loader in loaders] == [-(-len(s) // 4) for s in seen] == [len(list(x)) for x in loaders]


def test_flips_and_draws_have_the_right_frequency():
    ramp = np.tile(np.arange(256, dtype=np.uint8), (400, 1))[:, None, :, None]
    source = MemorySource("m", ramp)
    left = rows(make_loader(source, 400, train=True, seed=0, flip=True))[:, 0, 0, 0]
    assert 0.4 < (left == 1).float().mean() < 0.6
    loader = make_loader(source, 400, train=True, seed=0, binarize=True)
    drawn = torch.cat([rows(loader, epoch) for epoch in range(10)])[:, 0, 0]
    mean = drawn.mean(0)
    assert mean[0] == 0 and mean[255] == 1
    assert (mean - torch.arange(256) / 255).abs().max() < 4 * 0.5 / 4000**0.5  # four standard deviations
    assert not torch.equal(rows(loader, 0).sort(0)[0], rows(loader, 1).sort(0)[0])


def test_the_generator():
    index = np.arange(1000)
    u = uniform(keys(1, 2, FLIP, index), 33)
    assert u.shape == (1000, 33) and u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.02
    assert np.array_equal(uniform(keys(1, 2, FLIP, index[[7, 3]]), 5), u[[7, 3], :5])
    for other in (
        keys(2, 2, FLIP, index),
        keys(1, 3, FLIP, index),
        keys(1, 2, SHUFFLE, index),
        keys(-1, -1, FLIP, index),
    ):
        assert len(np.intersect1d(other, keys(1, 2, FLIP, index))) == 0
    assert sorted(permutation(10, 0, 0, SHUFFLE)) == list(range(10))
    # frozen: another stream would change every run that is resumed
    assert keys(0, 0, SHUFFLE, np.arange(2)).tolist() == [2391539541053276776, 7606012053026511699]
    assert permutation(8, 1, 2, SHUFFLE).tolist() == [0, 2, 5, 3, 4, 7, 1, 6]


def test_limit_and_wrong_numbers(numbered):
    source = MemorySource("m", numbered)
    assert set(indices(make_loader(source, 4, train=True, seed=0, limit=8))) == set(range(8))
    for options, message in [
        ({"batch_size": 60}, "50 training images, expected at least a batch of 60: use --batch-size 50 or less"),
        ({"batch_size": 30, "world": 2}, "50 training .* 30 on each of 2 processes: use --batch-size 25 or less"),
        ({"batch_size": 1, "world": 51}, "use fewer processes"),
        ({"batch_size": 0}, "--batch-size is 0, expected at least 1"),
        ({"padding": -1}, "padding is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
    ]:
        with pytest.raises(InputError, match=message):
            make_loader(source, **{"batch_size": 2, "train": True, "seed": 0, **options})
    assert len(make_loader(source, 60, train=False, seed=0)) == 1


def test_a_bad_file_reaches_the_consumer_and_the_threads_end(numbered):
    def read(i: int) -> np.ndarray:
        if i == 17:
            raise InputError("image 17 is broken")
        return numbered[i]

    before = threading.active_count()
    loader = make_loader(lazily(numbered, read), 8, train=False, seed=0, workers=2)
    with pytest.raises(InputError, match="image 17 is broken"):
        list(loader)
    assert threading.active_count() == before
    wrong = make_loader(lazily(numbered, lambda i: numbered[i, :-1]), 8, train=False, seed=0)
    with pytest.raises(InputError, match="image 0 is 5x5, expected 6x5: give --image-size"):
        next(iter(wrong))


def test_an_abandoned_iterator_stops_its_threads(numbered):
    read: list[int] = []
    before = threading.active_count()
    source = lazily(numbered, lambda i: read.append(i) or numbered[i])
    iterator = iter(make_loader(source, 2, train=False, seed=0, workers=2))
    assert read == []  # nothing runs before the first batch
    next(iterator)
    iterator.close()
    assert threading.active_count() == before and len(read) <= 10


def test_random_crops_change_with_the_epoch_only(pixels):
    wide = pixels(40, 8, 20, 3)
    source = LazySource("lazy", 40, (8, 8, 3), lambda i: wide[i], lambda i: str(i), Transform((8, 8), random_crop=True))
    assert np.array_equal(source[3], wide[3, :, 6:14])
    loaders = [make_loader(source, b, train=True, seed=0) for b in (40, 4)]
    assert torch.equal(rows(loaders[0], 1), rows(loaders[1], 1))
    assert not torch.equal(rows(loaders[0], 0).sort(0)[0], rows(loaders[0], 1).sort(0)[0])
    assert torch.equal(
        rows(make_loader(source, 40, train=False, seed=0)),
        torch.from_numpy(wide[:, :, 6:14]).permute(0, 3, 1, 2).float() / 255,
    )


def test_small_sources_are_kept_in_memory(numbered, monkeypatch):
    assert isinstance(base_module.keep_small(lazily(numbered)), MemorySource)
    monkeypatch.setattr(base_module, "MEMORY_LIMIT", numbered.nbytes - 1)
    assert base_module.keep_small(lazily(numbered)).images is None
    with pytest.raises(IndexError):
        lazily(numbered)[50]
    assert np.array_equal(lazily(numbered)[-1], numbered[-1])
