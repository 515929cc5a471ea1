"""What the benchmarks measure with. Times are never asserted."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch

from nvae_fast.benchmarks.timing import Work, gpu_columns, gpu_work, interleaved
from nvae_fast.memory import PeakMemory


def test_rivals_take_turns():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert calls == ["a", "b"] * 5
    for t in times.values():
        assert t.rounds == 4 and 0 < t.min_ms <= t.median_ms and t.iqr_ms >= 0
    assert gc.isenabled()


def test_a_spent_budget_leaves_three_rounds():
    assert interleaved({"a": lambda: None}, rounds=50, budget_s=0)["a"].rounds == 3


def test_what_the_gpu_does_of_a_trace(monkeypatch):
    """The second call is traced; events of the CPU do not count."""
    kinds, calls = torch.autograd.DeviceType, []

    class Trace:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            assert len(calls) == 1
            return self

        def __exit__(self, *_):
            assert len(calls) == 2

        def events(self):
            spans = [(kinds.CUDA, 1500.0), (kinds.CPU, 9000.0), (kinds.CUDA, 500.0)]
            return [SimpleNamespace(device_type=k, time_range=SimpleNamespace(elapsed_us=lambda t=t: t)) for k, t in spans]

    monkeypatch.setattr(torch.profiler, "profile", Trace)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    work = gpu_work(lambda: calls.append(1))
    assert work == Work(2, 2.0)
    assert gpu_columns(work, 4.0) == {"launches": 2, "busy_share": 0.5}
    assert gpu_columns(None, 4.0) == gpu_columns(work, None) == {"launches": None, "busy_share": None}


def test_peak_memory_of_a_known_sequence():
    x = torch.zeros(100)
    with PeakMemory() as m:
        y = x + 1  # 400 bytes
        view = y.view(10, 10)[2:]
        assert (m.live_bytes, m.peak_bytes) == (400, 400)
        z = torch.empty(50)  # 200 more
        del y  # the view keeps it
        assert m.live_bytes == 600
        del view
        assert (m.live_bytes, m.peak_bytes) == (200, 600)
        x.mul_(2)  # what was there before counts nothing, nor do views of it
        x_view = x[1:]
        torch.add(x, 1, out=x)
        assert (m.live_bytes, m.peak_bytes) == (200, 600)
        w = torch.cat([z, z, z, z])  # 800 more
        assert m.peak_bytes == 1000
    del w, x_view
    torch.empty(1000)
    assert m.peak_bytes == 1000


def test_peak_memory_counts_what_backward_keeps():
    x = torch.ones(100, requires_grad=True)
    with PeakMemory() as m:
        y = x.exp().sin()  # exp(x) is kept by both backwards
        assert m.live_bytes == 800
        y.sum().backward()
        assert m.peak_bytes >= 1200 and x.grad is not None
        del y
        assert m.live_bytes == 400  # the gradient
