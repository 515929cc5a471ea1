"""Tables of addresses: kept by their contents, filled from buffers set aside while a CUDA graph is captured."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _lists


class Device(str):
    """Stands for a GPU: tables that go to it stay on the CPU."""

    type = "cuda"


@pytest.fixture
def gpu(monkeypatch):
    """(device, state) with state["capturing"] and state["stream"] to be set."""
    state = {"capturing": False, "stream": 1, "copies": 0, "waits": 0}

    class Pinned(torch.Tensor):
        def to(self, device, non_blocking=False):
            state["copies"] += 1
            return self.as_subclass(torch.Tensor).clone()

    class Stream:
        cuda_stream = property(lambda self: state["stream"])

        def synchronize(self):
            state["waits"] += 1

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(_lists, "_pinned", lambda size: torch.zeros(max(size // 8, 1), dtype=torch.int64).as_subclass(Pinned))
    for name, empty in (("_tables", type(_lists._tables)()), ("_spares", {}), ("_in_graphs", []), ("_standing", {})):
        monkeypatch.setattr(_lists, name, empty)
    return Device("gpu"), state


def test_the_same_contents_are_copied_once(gpu):
    device, state = gpu
    values = _lists.numbers([(1, -2), (3, 4)])
    first = _lists.upload(values, device)
    assert first.tolist() == [1, -2, 3, 4] and _lists.upload(_lists.numbers([(1, -2, 3, 4)]), device) is first
    assert _lists.upload(_lists.numbers([(1, -2, 3, 5)]), device).tolist() == [1, -2, 3, 5]
    state["stream"] = 2  # which nothing has made wait for the copy
    assert _lists.upload(values, device) is not first and state["copies"] == 3


def test_the_oldest_tables_go(gpu):
    device, state = gpu
    for i in (*range(_lists.CAPACITY), 0, _lists.CAPACITY, 0, 1):
        _lists.upload(_lists.numbers([(i,)]), device)
    assert len(_lists._tables) == _lists.CAPACITY and state["copies"] == _lists.CAPACITY + 2
    assert len(_lists._spares[8]) == _lists.SPARES


def test_a_captured_copy_has_a_source_of_its_own(gpu):
    device, state = gpu
    known, other = _lists.numbers([(1, 2)]), _lists.numbers([(5, 6)])
    table = _lists.upload(known, device)
    state["capturing"] = True
    assert _lists.upload(known, device) is table  # which now stays, whatever is evicted
    assert _lists.upload(other, device).tolist() == [5, 6]
    assert [t.tolist() for t in _lists._in_graphs] == [[1, 2], [5, 6]] and not _lists._spares[16]
    with pytest.raises(RuntimeError, match="make the call once before, uncaptured"):
        _lists.upload(other, device)
    state["capturing"] = False
    assert _lists.upload(other, device).tolist() == [5, 6] and state["copies"] == 3  # not the graph's, which is still empty


def test_every_call_may_be_captured_on_another_stream(gpu):
    device, state = gpu
    values = _lists.numbers([(1, 2)])
    for _ in range(2):  # forward and backward
        _lists.upload(values, device)
    state["capturing"], state["stream"] = True, 2
    assert [_lists.upload(values, device).tolist() for _ in range(2)] == [[1, 2]] * 2
    assert len(_lists._in_graphs) == 2 and _lists._in_graphs[0] is not _lists._in_graphs[1]


def test_a_table_of_sizes_is_copied_once_for_all_streams_and_graphs(gpu):
    device, state = gpu
    values, other = _lists.jobs((2, 1)), _lists.jobs((3, 1))
    table = _lists.standing(values, device)
    assert table.tolist() == [0, 0, 1] and (state["copies"], state["waits"]) == (1, 1)
    for i in range(_lists.CAPACITY + 1):  # which would push it out if it were among the tables of addresses
        _lists.upload(_lists.numbers([(i, i)]), device)
    before = state["copies"]
    state["stream"], state["capturing"] = 2, True
    assert _lists.standing(values, device) is table
    assert (state["copies"], state["waits"]) == (before, 1) and not _lists._in_graphs
    with pytest.raises(RuntimeError, match="make the call once before, uncaptured"):
        _lists.standing(other, device)
    assert _lists.standing(values, torch.device("cpu")).tolist() == [0, 0, 1]


def test_jobs_and_groups():
    assert torch.frombuffer(bytearray(_lists.jobs((2, 0, 1))), dtype=torch.int64).tolist() == [0, 0, 2]
    assert _lists.starts((2, 0, 1)) == [0, 2, 2]
    assert list(_lists.grouped("abcab", lambda c: c == "b")) == [["a", "c", "a"], ["b", "b"]]
