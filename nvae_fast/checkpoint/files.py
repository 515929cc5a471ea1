"""Files that are whole or absent: written under a temporary name, synced to disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from nvae_fast.errors import InputError


def output_error(path: str | Path, error: OSError) -> InputError:
    """The one line that says why nothing can be written at `path`, and the cure."""
    cure = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
    return InputError(f"cannot write to '{path}': {error.strerror or error}; {cure}")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside into `output_error(path)`, also one that torch.save hides behind a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise output_error(path, reason) from None


def sync(path: Path) -> None:
    """Make the content of a file, or the renames in a folder, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def atomic_write(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Create or replace the file at `path` by what `write(file)` writes; on any failure the old file stays as it was."""
    path = Path(path)
    temporary = None
    with writing(path):
        if path.exists() and not (path.is_file() or path.is_dir()):  # a rename would put a file in its place
            raise FileExistsError(None, "it is a device or a pipe")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False) as file:
                temporary = Path(file.name)
                write(file)
            sync(temporary)  # by name: `write` may have put another file in its place
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
            raise


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder to fill; renamed to `path` (which must not exist) when the block ends, removed if it fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for file in temporary.iterdir():
                sync(file)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_keys(
    wanted: Mapping[str, Tensor],
    given: Mapping[str, Any],
    *,
    what: str = "checkpoint of another configuration",
    cure: str = "load it with the configuration it was trained with",
) -> None:
    """One InputError that says how a state differs from the model it should fill: missing, extra, or of another shape."""
    missing, extra = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    odd = [k for k in wanted if k in given and tuple(given[k].shape) != tuple(wanted[k].shape)]
    for verb, keys in (("lacks", missing), ("has unknown", extra)):
        if keys:
            raise InputError(f"{what}: it {verb} {len(keys)} of {len(wanted)} tensors, e.g. '{keys[0]}'; {cure}")
    if odd:
        k = odd[0]
        raise InputError(f"{what}: '{k}' has shape {tuple(given[k].shape)}, the model expects {tuple(wanted[k].shape)}; {cure}")
