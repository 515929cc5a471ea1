"""Shards of a data set: their names, how many images each has, and their bytes from disk or over HTTP."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

from ..errors import InputError
from .base import Request, find_pair, one_line, split_indices
from .tar import ERRORS, image_members

INDEX = "nvae_fast_index.json"
"""Beside the shards: {"shards": {name: {"bytes": n, "modified": ns, "images": n}}}."""

_MAX_SHARDS = 10**6
_TIMEOUT = 30.0  # seconds without a byte
_PAUSES = (0.5, 2.0, 8.0)  # seconds before each further attempt


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def expand(spec: str) -> tuple[str, ...]:
    """The shards that `x-{000..099}.tar`, `x-{a,b}.tar`, `x-*.tar` or URLs with braces name; none for any other path."""
    remote = is_url(spec)
    if not remote and (os.path.exists(spec) or not re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}|[*?\[]", spec)):
        return ()
    names = _braces(spec)
    if remote:
        return tuple(names)
    names = [os.path.expanduser(name) for name in names]
    return tuple(m for name in names for m in (sorted(glob.glob(name)) if glob.has_magic(name) else [name]))


def _braces(spec: str) -> list[str]:
    choices: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", spec):
        match = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if match:
            first, last = int(match[1]), int(match[2])
            if not 0 <= last - first < _MAX_SHARDS:
                raise InputError(f"'{part}' in --data: expected two ascending numbers, at most {_MAX_SHARDS} shards")
            choices.append([str(i).zfill(len(match[1])) for i in range(first, last + 1)])
        else:
            choices.append(part[1:-1].split(",") if part.startswith("{") and "," in part else [part])
    count = 1
    for choice in choices:
        count *= len(choice)
    if count > _MAX_SHARDS:
        raise InputError(f"--data '{spec}' names {count} shards, expected at most {_MAX_SHARDS}")
    return ["".join(parts) for parts in itertools.product(*choices)]


def split_shards(request: Request) -> list[str]:
    """The shards of a split: by the words `train` and `valid`, `validation`, `val` or `test` in the names of the files, or
    else of their folders; without these a seeded permutation of the shards is cut as images are elsewhere."""
    groups: dict[str, list[str]] = {}
    for shard in request.shards:
        *_, folder, name = ["", *urlsplit(shard).path.split("/")]
        words = [w for part in (folder, name) for w in re.split(r"[^a-z]+", part.lower())]
        word = next((w for w in reversed(words) if w in ("train", "valid", "validation", "val", "test")), None)
        groups.setdefault(word or "", []).append(shard)
    pair = find_pair(groups)
    if pair is not None:
        return groups[pair[0 if request.split == "train" else 1]]
    if len(request.shards) < 2:
        raise InputError(
            f"{request.shards[0]}: {len(request.shards)} shard(s), at least 2 are needed to split off validation images; "
            "a single local .tar is split by images with --dataset tar"
        )
    return [request.shards[i] for i in split_indices(request, len(request.shards))]


def open_shard(name: str) -> BinaryIO:
    """Its bytes, in order. Errors: OSError where a local file cannot be opened."""
    return cast(BinaryIO, HttpFile(name)) if is_url(name) else open(name, "rb")  # of which it has what tarfile reads with


class HttpFile:
    """The bytes behind a URL, in order; a broken connection is taken up again where it broke.

    Errors: an InputError that names the URL, at once where the server refuses, else after four attempts.
    """

    def __init__(self, url: str):
        self._url, self._at, self._total = url, 0, -1
        self._response: HTTPResponse | None = None

    def _connect(self) -> HTTPResponse:
        asked = {"Range": f"bytes={self._at}-"} if self._at else {}
        response = urllib.request.urlopen(urllib.request.Request(self._url, headers=asked), timeout=_TIMEOUT)
        if self._at and response.status != 206:  # a server that knows no ranges starts from the beginning
            left = self._at
            while left and (skipped := response.read(min(left, 2**20))):
                left -= len(skipped)
        elif not self._at:
            length = response.headers.get("Content-Length", "")
            self._total = int(length) if length.isdecimal() else -1
        return response

    def read(self, size: int) -> bytes:
        for pause in (*_PAUSES, None):
            try:
                if self._response is None:
                    self._response = self._connect()
                content = self._response.read(size)
                if not content and self._at < self._total:
                    raise ConnectionError(f"{self._at} of {self._total} bytes came")
                self._at += len(content)
                return content
            except (OSError, HTTPException) as error:  # URLError and its HTTPError are OSErrors
                self.close()
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or pause is None:
                    raise InputError(f"cannot read {self._url}: {one_line(error)}") from None
                time.sleep(pause)
        raise AssertionError

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
        self._response = None

    def __enter__(self) -> HttpFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _place(shard: str) -> tuple[str, str]:
    """(where its INDEX lies, its name there)."""
    if not is_url(shard):
        return str(Path(shard).parent / INDEX), Path(shard).name
    parts = urlsplit(shard)
    folder, _, name = parts.path.rpartition("/")
    return urlunsplit((parts.scheme, parts.netloc, f"{folder}/{INDEX}", "", "")), name


def counts(shards: Sequence[str]) -> list[int | None]:
    """Images of every shard: from the INDEX beside them, which is written for local shards; None where a URL has none."""
    tables: dict[str, dict[str, Any]] = {}
    changed: set[str] = set()
    out: list[int | None] = []
    for shard in shards:
        place, name = _place(shard)
        if place not in tables:
            tables[place] = _load(place)
        known = tables[place].get(name, {})
        if not is_url(shard):
            there = os.stat(shard)
            state = {"bytes": there.st_size, "modified": there.st_mtime_ns}
            if any(known.get(key) != value for key, value in state.items()):
                known = tables[place][name] = state | {"images": count(shard)}
                changed.add(place)
        out.append(known.get("images"))
    for place in changed:
        _store(place, tables[place])
    return out


def count(shard: str) -> int:
    """Images of a shard, by reading it (of a local one only its headers)."""
    mode = "r|" if is_url(shard) else "r:"
    try:
        with open_shard(shard) as stream:
            return sum(1 for _ in image_members(stream, mode, shard))
    except InputError:
        raise
    except ERRORS as error:
        raise unreadable(shard, error) from None


def unreadable(shard: str, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"cannot read {shard}: {error.strerror}")
    return InputError(f"{shard} is not a readable tar archive ({one_line(error)}): fetch it again")


def _load(place: str) -> dict[str, Any]:
    try:
        if is_url(place):
            with HttpFile(place) as stream:
                text = b"".join(itertools.islice(iter(lambda: stream.read(2**20), b""), 1000))
        else:
            text = Path(place).read_bytes()
    except (OSError, InputError):
        return {}
    try:
        table = json.loads(text)["shards"]
        for entry in table.values():
            if not isinstance(entry["images"], int) or entry["images"] < 0:
                raise ValueError("counts that are none")
        return table
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{place} is damaged ({one_line(error)}): remove it, it is made again from local shards") from None


def _store(place: str, table: dict[str, Any]) -> None:
    """Only a convenience: where the folder cannot be written to, the shards are counted at every start."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(place), delete=False, encoding="utf-8") as file:
            json.dump({"shards": table}, file, indent=1)
        os.chmod(file.name, 0o644)
        os.replace(file.name, place)
    except OSError:
        pass
