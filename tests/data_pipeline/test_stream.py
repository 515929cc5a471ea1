"""WebDataset shards: what a stream guarantees of order, ranks and restarts; counts; HTTP."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest
import torch

from nvae_fast.data import make_loader, open_images, shards
from nvae_fast.data import stream as stream_module
from nvae_fast.data.prepare import prepare
from nvae_fast.errors import InputError

SIZES = (5, 9, 3, 7, 6, 1, 8)  # of the training shards: 39 images, numbered through in their first pixel
OPTIONS = {"train": True, "seed": 3, "flip": True, "binarize": False}


def numbers(batches) -> list[int]:
    return [int(n) for x in batches for n in (x[:, 0, 0, 0] * 255).round()]


def batches(loader, epoch: int = 0, start: int = 0) -> list[torch.Tensor]:
    loader.set_epoch(epoch, start)
    return list(loader)


@pytest.mark.parametrize("spec", ["{train,val}-*.tar", "train-{000..006}.tar", "", "*.tar"])
def test_specs(folder, spec, numbered):
    source = open_images(f"{folder}/{spec}" if spec else folder)
    if spec.startswith("train"):  # no validation shards among them: shards are split off
        assert len(source) + len(open_images(f"{folder}/{spec}", split="valid")) == sum(SIZES)
        return
    assert (len(source), source.height, source.width, source.channels, source.images) == (39, 5, 4, 3, None)
    valid = open_images(f"{folder}/{spec}" if spec else folder, split="valid")
    got = torch.cat(list(make_loader(valid, 4, train=False, seed=0)))
    assert np.array_equal((got * 255).round().byte().permute(0, 2, 3, 1).numpy(), numbered[39:49])
    with pytest.raises(InputError, match="is a stream"):
        source[0]


def test_names():
    assert shards.expand("a-{08..11}.tar") == ("a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar")
    assert shards.expand("http://x/{a,b}/{0..1}.tar?k=1") == tuple(f"http://x/{c}/{i}.tar?k=1" for c in "ab" for i in (0, 1))
    assert shards.expand("a.tar") == shards.expand("/no/{brace") == ()
    for spec, message in (
        ("{5..1}.tar", "two ascending numbers"),
        ("{0..9999999}", "at most 1000000"),
        ("{0..999}" * 3, "1000000000"),
    ):
        with pytest.raises(InputError, match=message):
            shards.expand(spec)


@pytest.mark.parametrize("window", [1, 4, 10, 1000])
@pytest.mark.parametrize("known", [True, False])
def test_a_training_epoch(folder, window, known, monkeypatch):
    if not known:
        monkeypatch.setattr(shards, "counts", lambda names: [None] * len(names))
    source = open_images(folder, window=window, images_per_epoch=None if known else 39)
    loader = make_loader(source, 4, **OPTIONS)
    assert len(loader) == 9
    epochs = [batches(loader, epoch) for epoch in (0, 1)]
    seen = [numbers(epoch) for epoch in epochs]
    assert all(len(set(s)) == 36 for s in seen) and seen[0] != seen[1]
    shard_of = np.repeat(range(7), SIZES)[seen[0]]
    assert (np.count_nonzero(np.diff(shard_of)) <= 6) == (window == 1)  # windows mix neighbouring shards
    for start in range(10):
        again = make_loader(open_images(folder, window=window, images_per_epoch=None if known else 39), 4, **OPTIONS, workers=3)
        assert all(torch.equal(a, b) for a, b in zip(batches(again, 1, start), epochs[1][start:], strict=True)), start
    assert not any(t.name.startswith("nvae-fast") for t in threading.enumerate())


def test_a_restart_opens_only_the_shards_it_needs(folder, monkeypatch):
    source = open_images(folder, window=4)
    opened = []
    real = shards.open_shard
    monkeypatch.setattr(shards, "open_shard", lambda name: opened.append(name) or real(name))
    loader = make_loader(source, 4, **OPTIONS)
    batches(loader)
    assert len(opened) == 7
    opened.clear()
    batches(loader, 0, 8)
    assert len(opened) <= 3


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks(folder, world):
    source = open_images(folder, window=6)
    loaders = [make_loader(source, 2, **OPTIONS, rank=r, world=world) for r in range(world)]
    assert {len(x) for x in loaders} == {39 // (2 * world)}
    parts = [batches(x) for x in loaders]
    assert all(len(x) == 2 for part in parts for x in part) and len({len(p) for p in parts}) == 1
    shard_of = np.repeat(range(7), SIZES)
    dealt = [{int(shard_of[n]) for n in numbers(part)} for part in parts]
    assert all(a.isdisjoint(b) for i, a in enumerate(dealt) for b in dealt[:i])
    for part, loader in zip(parts, loaders, strict=True):  # also where a rank goes round
        for start in range(len(part) + 1):
            assert all(torch.equal(a, b) for a, b in zip(batches(loader, 0, start), part[start:], strict=True))
    with pytest.raises(InputError, match="has 7 training shards, 8 processes need at least as many"):
        make_loader(source, 1, **OPTIONS, world=8)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 6, 1])
def test_an_evaluation_counts_every_image_once(folder, world, limit):
    source = open_images(folder, split="valid")
    loaders = [make_loader(source, 4, train=False, seed=0, rank=r, world=world, limit=limit) for r in range(world)]
    parts = [batches(x) for x in loaders]
    assert [len(p) for p in parts] == [len(x) for x in loaders]
    assert sorted(n for p in parts for n in numbers(p)) == list(range(39, 49 if limit is None else 39 + limit))
    assert [numbers(batches(x, 0, min(1, len(x)))) for x in loaders] == [numbers(p[1:]) for p in parts]


def test_corrupt_images(tmp_path, numbered, caplog, shard):
    shard(tmp_path / "train.tar", [b"bad", *numbered[:4], b"bad", *numbered[4:6]], extra=False)
    shard(tmp_path / "valid.tar", [*numbered[:2], b"bad", numbered[3]])
    source = open_images(tmp_path)
    assert sorted(numbers(batches(make_loader(source, 2, **OPTIONS)))) == [0, 0, 0, 1, 2, 3, 4, 5]  # the first stands in
    assert numbers(batches(make_loader(open_images(tmp_path, split="valid"), 1, train=False, seed=0))) == [0, 1, 3]
    assert "train.tar:sub/005.png is no image" in caplog.text
    with pytest.raises(InputError, match="train.tar:sub/000.png is no image"):
        open_images(tmp_path, max_corrupt=0)
    assert prepare(tmp_path, tmp_path / "o") == {"train": 6, "valid": 3}


def test_grey_and_sizes(tmp_path, pixels, refused, shard):
    for name in ("train", "valid"):
        shard(tmp_path / f"{name}.tar", [pixels(4, 4), pixels(4, 4, 3)])
    source = open_images(tmp_path)
    assert source.channels == 1
    with pytest.raises(InputError, match="001.png has colours, but .*000.png, the first image, has none"):
        batches(make_loader(source, 2, **OPTIONS))
    shard(tmp_path / "train.tar", [pixels(4, 4, 3), pixels(4, 4), pixels(6, 4)])
    with pytest.raises(InputError, match="002.png is 6x4, expected 4x4: give --image-size"):
        batches(make_loader(open_images(tmp_path), 3, **OPTIONS))
    assert batches(make_loader(open_images(tmp_path, image_size=(2, 2)), 3, **OPTIONS))[0].shape == (3, 3, 2, 2)


def test_the_index(folder, refused, monkeypatch, shard):
    open_images(folder)
    index = folder / shards.INDEX
    table = json.loads(index.read_text())["shards"]
    assert {name: entry["images"] for name, entry in table.items() if "train" in name} == {
        f"train-{i:03}.tar": n for i, n in enumerate(SIZES)
    }
    with monkeypatch.context() as patch:
        patch.setattr(shards, "count", lambda name: pytest.fail("counted twice"))
        assert len(open_images(folder)) == 39
    shard(folder / "train-000.tar", [np.zeros((5, 4, 3), np.uint8)] * 50)  # a new shard of another size is counted again
    assert len(open_images(folder)) == 84
    index.write_text(index.read_text().replace('"images": 50', '"images": 3'))
    with pytest.raises(InputError, match=f"train-000.tar does not have the 3 images that {shards.INDEX} says"):
        batches(make_loader(open_images(folder), 4, **OPTIONS))
    index.write_text(index.read_text().replace('"images": 3\n', '"images": 60\n'))
    with pytest.raises(InputError, match=f"train-00[02].tar does not have the 60 images that {shards.INDEX} says"):
        batches(make_loader(open_images(folder), 4, **OPTIONS))
    for text in ("{", "[]", '{"shards": {"a": {"bytes": 1, "images": -1}}}', '{"shards": {"a": 3}}'):
        index.write_text(text)
        refused(folder, f"{shards.INDEX} is damaged")
    index.unlink()
    monkeypatch.setattr(shards.tempfile, "NamedTemporaryFile", lambda *a, **k: (_ for _ in ()).throw(PermissionError()))
    assert len(open_images(folder)) == 84 and not index.exists()


def test_wrong_use(tmp_path, numbered, refused, shard):
    shard(tmp_path / "a.tar", numbered[:6])
    refused(str(tmp_path / "{a,b}.tar"), "b.tar")
    refused(str(tmp_path / "?.tar"), "1 shard(s), at least 2", "--dataset tar")
    refused(tmp_path / "a.tar", "--images-per-epoch is for WebDataset shards", images_per_epoch=5)
    refused(tmp_path, "--images-per-epoch is 0", images_per_epoch=0)
    refused(str(tmp_path / "[ab]*.tar"), "--shuffle-window is 0", window=0)
    shard(tmp_path / "b.tar", [])
    refused(str(tmp_path / "b*.tar"), "at least 2")
    shard(tmp_path / "c.tar", [])
    refused(str(tmp_path / "{b,c}.tar"), "no readable image in")
    source = open_images(tmp_path / "a.tar", valid_fraction=0.5)  # one tar: images at random places, as in a folder
    assert source.images is not None and len(source) == 3


def test_a_failing_reader_is_raised_where_it_is_consumed():
    def items():
        yield 1
        raise InputError("broken")

    drawn = stream_module.ahead(items(), 1)
    assert next(drawn) == 1
    with pytest.raises(InputError, match="broken"):
        next(drawn)
    endless = stream_module.ahead(iter(int, 1), 2)
    next(endless)
    endless.close()
    assert not any(t.name == "nvae-fast-reader" for t in threading.enumerate())
