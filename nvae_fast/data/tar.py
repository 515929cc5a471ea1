"""Tar archives, member by member, in bounded memory."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from ..errors import InputError
from .base import one_line, read_up_to
from .corrupt import CorruptImage
from .decode import IMAGE_SUFFIXES, MAX_FILE

_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
ERRORS = (tarfile.TarError, EOFError, OSError, zlib.error, ValueError, OverflowError)
"""What tarfile raises on damaged archives."""


class _Info(tarfile.TarInfo):
    """A header; those that tarfile would read into memory whole may not be long."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Info:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _EXTENDED and info.size > 2**20):
            raise tarfile.ReadError(f"a header with {info.size} bytes")
        return cast(_Info, info)

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Info:
        try:
            return cast(_Info, super().fromtarfile(archive))
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]  # not in the stubs
            raise tarfile.ReadError(
                str(error)
            ) from None  # which tarfile takes for the end of an archive, behind its first member


def members(stream: BinaryIO, mode: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The plain files of an archive. Modes: 'r:' where the stream can seek, 'r|' where it cannot, 'r:*' also compressed."""
    try:
        opened = tarfile.open(fileobj=stream, mode=mode, tarinfo=_Info)  # type: ignore[call-overload]  # the stubs want a literal mode
    except AttributeError as error:  # of Python's early 3.11s, on a damaged beginning of a compressed stream
        raise tarfile.ReadError(one_line(error)) from None
    with opened as archive:
        last = -1
        while (info := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep every header
            if info.size < 0 or info.offset <= last:  # a size in an extended header may lead back for ever
                raise tarfile.ReadError(f"a member with {info.size} bytes")
            last = info.offset
            if info.isreg() and not info.issparse():
                yield info, archive


def image_members(stream: BinaryIO, mode: str, label: str) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """Those named like images; two such files in one sample (same name up to its first dot) are refused."""
    sample = ""
    for info, archive in members(stream, mode):
        if not info.name.lower().endswith(IMAGE_SUFFIXES) or Path(info.name).name.startswith("."):
            continue
        folder, _, name = info.name.rpartition("/")
        key = f"{folder}/{name.split('.')[0]}"
        if key == sample:
            raise InputError(f"{label} has two images named {key.strip('/')}: keep one image in each sample")
        sample = key
        yield info, archive


def content(info: tarfile.TarInfo, archive: tarfile.TarFile, label: str) -> bytes:
    """The bytes of a member, at most MAX_FILE of them."""
    if info.size > MAX_FILE:
        raise CorruptImage(f"{label} has over {MAX_FILE >> 20} MiB, which no image needs: take it out")
    stream = archive.extractfile(info)
    return b"" if stream is None else stream.read()


class TarArchive:
    """The images of an uncompressed tar archive, read where they lie; other files are passed over."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as stream:
                found = image_members(stream, "r:", str(path))
                self._places = {info.name: (info.offset_data, info.size) for info, _ in found}
        except InputError:
            raise
        except ERRORS as error:
            raise InputError(f"{path} is not a readable tar archive ({one_line(error)}): fetch it again") from None
        self.names = list(self._places)

    def label(self, name: str) -> str:
        return f"{self.path}:{name}"

    def open(self, name: str) -> BinaryIO:
        offset, size = self._places[name]
        with open(self.path, "rb") as stream:
            stream.seek(offset)
            return io.BytesIO(read_up_to(stream, min(size, MAX_FILE + 1)))
