"""How much memory the tensors of a piece of code hold at once, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors made inside the block and still alive: `live_bytes` now, `peak_bytes` at most.

        with PeakMemory() as m:
            y = model(x)
            y.sum().backward()
        print(m.peak_bytes)

    What existed before (inputs, weights) counts nothing, and a storage counts once however many tensors view it. Tensors kept
    for backward count, as do gradients. Buffers that live inside one native call do not show, nor does code of torch.compile,
    which allocates past the dispatcher. It slows every call: never time anything inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}  # by the address of the storage, so that views are found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        given = {s._cdata for s in _storages((args, kwargs))}
        out = func(*args, **kwargs)
        if func.name() == "nvae_fast::adamax_place":  # a storage over memory that is counted
            return out
        for storage in _storages(out):
            key = storage._cdata
            if key not in given and key not in self._alive:
                size = storage.nbytes()
                self._alive[key] = weakref.ref(storage, partial(self._freed, key)), size
                self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def _freed(self, key: int, _: weakref.ref) -> None:
        self.live_bytes -= self._alive.pop(key)[1]


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for t in tree_leaves(values):
        if isinstance(t, Tensor) and t.layout == torch.strided:
            yield t.untyped_storage()
