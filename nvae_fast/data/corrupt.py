"""Images that cannot be read: named, counted, passed over up to a limit."""

from __future__ import annotations

import logging
import threading

from ..errors import InputError

_log = logging.getLogger("nvae_fast.data")  # without a configuration of logging, Python prints warnings on stderr


class CorruptImage(InputError):
    """One image cannot be read; the others may be fine."""


class Corrupt:
    """The unreadable images of a source.

    Each is named once, as a warning. More than `limit` of them are an InputError; with limit 0 that is the first one's own.
    Safe to use from several threads.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._found: set[str] = set()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, label: str) -> bool:
        return label in self._found

    def add(self, label: str, error: CorruptImage) -> None:
        """Count an image. Raises an InputError when that is one too many."""
        with self._lock:
            if label in self._found:
                return
            if self.limit == 0:
                raise error
            if len(self._found) == self.limit:
                raise InputError(
                    f"more than {self.limit} images cannot be read (the others are named above); the last: {error}; "
                    "or allow more with --max-corrupt"
                )
            self._found.add(label)
        _log.warning("skipped an image (%d of at most %d): %s", len(self._found), self.limit, error)
