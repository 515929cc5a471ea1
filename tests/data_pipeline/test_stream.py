"""WebDataset shards: what a stream guarantees of order, ranks and restarts; counts; HTTP."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_fast.data import make_loader, open_images, shards
from nvae_fast.data import stream as stream_module
from nvae_fast.data.prepare import prepare
from nvae_fast.errors import InputError

SIZES = (5, 9, 3, 7, 6, 1, 8)  # of the training shards: 39 images, numbered through in their first pixel
OPTIONS = {"train": True, "seed": 3, "flip": True, "binarize": False}


def shard(path: Path, images, kind: str = "PNG", extra: bool = True) -> None:
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
def numbered(pixels) -> np.ndarray:
    images = pixels(60, 5, 4, 3)
    images[:, 0, 0] = images[:, 0, -1] = np.arange(60)[:, None]
    return images


@pytest.fixture
def folder(tmp_path, numbered) -> Path:
    """train-000.tar ... train-006.tar with images 0 to 38, val-0.tar and val-1.tar with 39 to 48."""
    at = 0
    for i, n in enumerate(SIZES):
        shard(tmp_path / "s" / f"train-{i:03}.tar", numbered[at : at + n])
        at += n
    shard(tmp_path / "s" / "val-0.tar", numbered[39:43])
    shard(tmp_path / "s" / "val-1.tar", numbered[43:49])
    return tmp_path / "s"


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


def test_corrupt_images(tmp_path, numbered, caplog):
    shard(tmp_path / "train.tar", [b"bad", *numbered[:4], b"bad", *numbered[4:6]], extra=False)
    shard(tmp_path / "valid.tar", [*numbered[:2], b"bad", numbered[3]])
    source = open_images(tmp_path)
    assert sorted(numbers(batches(make_loader(source, 2, **OPTIONS)))) == [0, 0, 0, 1, 2, 3, 4, 5]  # the first stands in
    assert numbers(batches(make_loader(open_images(tmp_path, split="valid"), 1, train=False, seed=0))) == [0, 1, 3]
    assert "train.tar:sub/005.png is no image" in caplog.text
    with pytest.raises(InputError, match="train.tar:sub/000.png is no image"):
        open_images(tmp_path, max_corrupt=0)
    assert prepare(tmp_path, tmp_path / "o") == {"train": 6, "valid": 3}


def test_grey_and_sizes(tmp_path, pixels, refused):
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


def test_the_index(folder, refused, monkeypatch):
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


def test_wrong_use(tmp_path, numbered, refused):
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


class Handler(BaseHTTPRequestHandler):
    """Serves server.folder; breaks every connection after server.cut bytes, and knows ranges if server.ranges."""

    def do_GET(self) -> None:
        server = self.server
        path = server.folder / self.path.split("?")[0].lstrip("/")
        server.asked.append((path.name, self.headers.get("Range")))
        if server.fail or not path.is_file():
            self.send_error(server.fail or 404)
            return
        content, start = path.read_bytes(), 0
        if server.ranges and self.headers.get("Range"):
            start = int(self.headers["Range"][6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: server.cut])

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(shards, "_PAUSES", (0.0,) * 60)
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.folder, server.asked, server.cut, server.ranges, server.fail = folder, [], None, True, 0
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("cut", "ranges"), [(None, True), (9000, True), (9000, False)])
def test_http(folder, server, cut, ranges):
    local = open_images(folder, window=6)
    expected = batches(make_loader(local, 4, **OPTIONS), 1)
    server.cut, server.ranges = cut, ranges
    if not ranges:  # such a server can never give more than its first bytes
        server.cut = 10**6
    spec = server.url + "/{train-000,train-001,train-002,train-003,train-004,train-005,train-006,val-0,val-1}.tar?token=1"
    source = open_images(spec, window=6)  # the index that the local run left is served, too
    assert len(source) == 39
    got = batches(make_loader(source, 4, **OPTIONS), 1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert any(asked for _, asked in server.asked) == (cut is not None and ranges)
    valid = open_images(spec, split="valid")
    assert numbers(batches(make_loader(valid, 4, train=False, seed=0))) == list(range(39, 49))


def test_http_without_an_index(folder, server):
    spec = server.url + "/{train-000,train-001,val-0,val-1}.tar"
    with pytest.raises(InputError, match="train-000.tar is not known: give --images-per-epoch, or serve beside"):
        make_loader(open_images(spec), 4, **OPTIONS)
    assert prepare(spec, folder / "o", bar=True) == {"train": 14, "valid": 10}
    source = open_images(spec, images_per_epoch=20)
    seen = Counter(numbers(batches(make_loader(source, 4, **OPTIONS))))
    assert len(source) == 20 and set(seen) == set(range(14)) and max(seen.values()) == 2  # 14 images, gone round
    assert len(open_images(spec, split="valid", images_per_epoch=20)) == 10  # counted by reading them once
    with pytest.raises(InputError, match="an evaluation needs"):
        make_loader(source, 4, train=False, seed=0)


def test_http_failures(folder, server, refused):
    spec = server.url + "/{train-000,val-9}.tar"
    refused(spec, "val-9.tar", "404", images_per_epoch=5, split="valid")
    assert len([1 for name, _ in server.asked if name == "val-9.tar"]) == 1  # a refusal is not asked again
    server.fail = 503
    server.asked.clear()
    refused(spec, "train-000.tar", "503", images_per_epoch=5)
    assert len([1 for name, _ in server.asked if name == "train-000.tar"]) == 61
    server.fail = 0
    (folder / shards.INDEX).write_text("{")
    refused(spec, shards.INDEX, "is damaged", images_per_epoch=5)


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
