"""The two errors a command turns into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad usage or bad input: the message names the value, the expectation and the cure. Exit code 2.

    A place that cannot be written to, such as a full disk, counts as input.
    """


class RunError(RuntimeError):
    """The run itself failed (diverged, lost a rank). Exit code 1."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """An InputError for a name that is not in a table; it lists the nearest names, or all of a short table."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    return InputError(f"unknown {kind} '{name}': {hint}known: {', '.join(names)}")


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn what Python, numpy and torch raise when memory runs out into a RunError; also a decorator."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        wanted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "t allocate memory" in said
        if not wanted or isinstance(error, RunError):
            raise
        raise RunError(f"out of memory ({said}): use a smaller --batch_size, in training also --memory low") from None
