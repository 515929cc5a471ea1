"""WebDataset shards behind a URL: ranges, broken connections, refusals, counts."""

from __future__ import annotations

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from nvae_fast.data import make_loader, open_images, shards
from nvae_fast.data.prepare import prepare
from nvae_fast.errors import InputError

OPTIONS = {"train": True, "seed": 3, "flip": True, "binarize": False}


def batches(loader, epoch: int = 0) -> list[torch.Tensor]:
    loader.set_epoch(epoch)
    return list(loader)


def numbers(batches) -> list[int]:
    return [int(n) for x in batches for n in (x[:, 0, 0, 0] * 255).round()]


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
