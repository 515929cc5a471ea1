"""The memory that native CPU ops keep for their next large outputs."""

from __future__ import annotations

import threading

import pytest
import torch

from nvae_fast import functional as F
from nvae_fast.kernels import _impl

NATIVE = _impl.load_native()[0]
pytestmark = pytest.mark.skipif(NATIVE is None, reason="nvae_fast was installed without its native extension")
MIB = 2**20


@pytest.fixture(autouse=True)
def pooled():
    """Not under NaN-filled memory, which comes from torch; nothing kept before or after."""
    torch.use_deterministic_algorithms(False)
    NATIVE.release_memory()
    yield
    NATIVE.release_memory()


def output(mib: int) -> torch.Tensor:
    x = torch.zeros(1, 64, 64, 64 * mib).contiguous(memory_format=torch.channels_last)  # 1 MiB for each `mib`
    return F.bn_act(x, None, None, torch.zeros(64), torch.ones(64), training=False, impl="cpu")


def test_a_freed_block_is_used_again_and_given_back_on_request():
    y = output(2)
    where = y.data_ptr()
    assert where % 64 == 0 and NATIVE.release_memory() == 0
    del y
    y = output(2)
    assert y.data_ptr() == where and bool((y == 0).all())
    del y
    assert NATIVE.release_memory() >= 2 * MIB and NATIVE.release_memory() == 0


def test_what_is_kept_and_used_is_bounded_by_what_was_in_use():
    outputs = [output(2) for _ in range(3)]
    del outputs
    big = output(5)
    assert NATIVE.release_memory() <= 4 * MIB + 2**19  # 6 MiB at most were in use, 5 are now: 9 may be in all
    del big


def test_tensors_behave_and_outlive_their_thread():
    found = {}
    thread = threading.Thread(target=lambda: found.update(y=output(2)))
    thread.start()
    thread.join()
    y = found.pop("y")
    copy = y.clone()
    y.untyped_storage().resize_(y.untyped_storage().nbytes() * 2)
    assert torch.equal(y, copy) and y.is_contiguous(memory_format=torch.channels_last)
