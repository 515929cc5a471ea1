"""Many small tensors in few buffers, for what must copy all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nvae_fast.kernels.adamax.api import placed

ALIGNED = 4  # values: each tensor begins on 16 bytes, as tensors of their own do


class Packed:
    """Tensors whose memory is moved into one buffer for each type and device. They stay the tensors they are, with values,
    shapes and, as buffers of modules have, contiguous strides."""

    def __init__(self, find: Callable[[], Sequence[Tensor]]) -> None:
        """`find` returns the tensors, which may be others later: modules replace their buffers when they are moved."""
        self._find = find
        self._pack()

    def buffers(self) -> list[Tensor]:
        """The buffers, [n] each, with what the tensors hold now. Tensors that are elsewhere meanwhile (after `.to()`,
        or in another Packed) are moved back."""
        if not self.intact():
            self._pack()
        return self._flats

    def intact(self) -> bool:
        """Whether all tensors are where they were put."""
        return [t.data_ptr() for t in self._find()] == self._pointers

    def _pack(self) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        tensors = self._find()
        for t in tensors:
            kinds.setdefault((t.dtype, t.device), []).append(t)
        self._flats = []
        with torch.no_grad():
            for (dtype, device), same in kinds.items():
                sizes = [-(-t.numel() // ALIGNED) * ALIGNED for t in same]
                flat, begin = torch.zeros(sum(sizes), dtype=dtype, device=device), 0
                for t, size in zip(same, sizes, strict=True):
                    there = placed(flat, begin, t.shape, torch.empty(t.shape, device="meta").stride())
                    there.copy_(t)
                    t.data = there
                    begin += size
                self._flats.append(flat)
        self._pointers = [t.data_ptr() for t in tensors]
