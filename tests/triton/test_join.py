"""Sums and statistics of tasks joined in order, by launches of their own and by the last program of a launch; its tickets."""

from __future__ import annotations

import types

import pytest
import torch

from nvae_fast.kernels import _triton

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from nvae_fast.kernels import _join  # noqa: E402
from nvae_fast.kernels._join import arrive, join, join_sums, join_tile, join_tiles, joined_stats, joined_sums  # noqa: E402

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
ROWS = 7  # of a task


def parts_of(tasks, last=ROWS, channels=5):
    """(values [., channels], mean and sum of squares about it of each task)"""
    x = torch.randn(tasks * ROWS - ROWS + last, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks))
    parts = [torch.stack((t.mean(0), (t - t.mean(0)).square().sum(0))) for t in (x + 30).split(ROWS)]
    return x + 30, torch.stack(parts).float()


@pytest.mark.parametrize("tasks", [1, 33, 128, 129, 300])
def test_sums_of_tasks_by_a_launch_of_their_own(tasks):
    _, parts = parts_of(tasks)
    torch.testing.assert_close(join_sums(parts).double(), parts.double().sum(0), rtol=2e-7, atol=0)
    assert torch.equal(join_sums(parts, torch.float16), join_sums(parts).half())


@triton.jit
def in_any_order_kernel(from_ptr, order_ptr, out_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, M, C, CHUNK, STATS: tl.constexpr,
                        BLOCK_C: tl.constexpr):  # fmt: skip
    """Program i does task order[i], where `from` has what the task finds."""
    task, block = tl.load(order_ptr + tl.program_id(0)), tl.program_id(1)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    for row in range(2):
        value = tl.load(from_ptr + (2 * task + row) * C + c, mask=c < C)
        tl.store(parts_ptr + (2 * task + row) * C + c, value, mask=c < C)
    if STATS:
        done, a, b = joined_stats(parts_ptr, tickets_ptr, task, block, c, M, C, CHUNK, TASKS, GROUP)
    else:
        done, a, b = joined_sums(parts_ptr, tickets_ptr, task, block, c, C, TASKS, GROUP)
    if done:
        tl.store(out_ptr + c, a.to(tl.float32), mask=c < C)
        tl.store(out_ptr + C + c, b.to(tl.float32), mask=c < C)


def joined(x, parts, stats, order, group=None, block=4):
    """By the kernel above; `group` tasks are joined first, by default as many as `join` says."""
    tasks, _, channels = parts.shape
    out, blocks = torch.full((2, channels), torch.nan), triton.cdiv(channels, block)
    given = join(parts, tasks, channels, blocks)
    if group:
        given = given._replace(parts=parts.new_empty(2 * tasks, 2, channels), GROUP=group)
    given.parts.fill_(torch.nan)
    in_any_order_kernel[(tasks, blocks)](parts, order, out, *given, len(x), channels, ROWS, STATS=stats, BLOCK_C=block)
    assert not given.tickets.any()  # as the next launch expects them
    return out


def test_the_last_program_joins_the_same_bits_in_any_order_launch_after_launch():
    for tasks, group in ((1, None), (17, None), (40, 17), (40, 2)):  # a group, and groups, of more than are read at a time
        x, parts = parts_of(tasks, last=3)
        ways = torch.arange(tasks), torch.randperm(tasks)
        for stats in (True, False):
            found, other = (joined(x, parts, stats, order, group) for order in ways)
            assert torch.equal(found, other)
            truth = torch.stack((x.mean(0), x.var(0, correction=0))) if stats else parts.double().sum(0)
            torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("tasks", "group", "groups"), [(1, 16, 0), (16, 16, 0), (17, 16, 2), (513, 17, 31), (2000, 63, 32)])
def test_a_task_has_a_row_and_so_has_a_group_of_several(tasks, group, groups):
    found = join(torch.empty(0), tasks, 5, 3)
    assert (found.TASKS, found.GROUP, found.parts.shape) == (tasks, group, (tasks + groups, 2, 5))


def test_nan_stays_in_its_channel_and_an_equal_channel_has_no_negative_variance():
    x, parts = parts_of(20)
    parts[7, 0, 1], parts[:, :, 2] = torch.nan, torch.tensor([3.0, -1e-6])
    for stats in (True, False):
        assert joined(x, parts, stats, torch.arange(20)).isnan().tolist() == [
            [False, True, *[False] * 3],
            [False, stats, *[False] * 3],
        ]
    assert joined(x, parts, True, torch.arange(20))[1, 2] == 0


@triton.jit
def tiles_in_any_order_kernel(from_ptr, order_ptr, out_ptr, parts_ptr, tickets_ptr, TASKS, GROUP, N, K, PITCH, SIZE,
                              ROWS: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Program i does task order[i], for a tile of ROWS rows, where `from` has what the task finds."""
    task, tile, k = tl.load(order_ptr + tl.program_id(0)), tl.program_id(1), tl.arange(0, BLOCK_K)
    n = tile * ROWS + tl.arange(0, ROWS)
    at, inside = task * SIZE + n[:, None] * PITCH + k[None, :], (n < N)[:, None] & (k < K)[None, :]
    tl.store(parts_ptr + at, tl.load(from_ptr + at, mask=inside), mask=inside)
    join_tile(parts_ptr, tickets_ptr, out_ptr, task, tile, tile * ROWS, k, N, K, PITCH, SIZE, TASKS, GROUP, ROWS)


@pytest.mark.parametrize(("tasks", "group"), [(3, 8), (7, 3), (9, 3)])
def test_the_last_program_joins_a_tile_in_the_order_of_its_tasks(monkeypatch, tasks, group):
    """Of numbers whose sum depends on the order, in float64 as well."""
    n, k, pitch, taken = 6, 5, 7, 33
    for name, value in (("VALUES", tl.constexpr(16)), ("AHEAD", tl.constexpr(2))):  # two rows of two tasks at a time
        monkeypatch.setattr(_join, name, value)
    values = torch.randn(tasks, n * pitch, generator=torch.Generator().manual_seed(tasks))
    values[0], values[2] = 2.0**60, -(2.0**60)
    ordered = [sum(g.double(), torch.zeros(())).float() for g in values.split(group)]
    ordered = sum(torch.stack(ordered).double(), torch.zeros(())).float() if len(ordered) > 1 else ordered[0]
    before = join(torch.empty(0), 1, 4, 1)
    for order in (torch.arange(tasks), torch.arange(tasks).flip(0), torch.randperm(tasks)):
        given = join_tiles(torch.empty(0), tasks, n * pitch, 2, before, 1)._replace(GROUP=group)
        given = given._replace(parts=torch.full((2 * tasks, n * pitch), torch.nan))
        out = torch.full((n, pitch), torch.nan)
        tiles_in_any_order_kernel[(tasks, 2)](values, order, out, *given, n, k, pitch, n * pitch, ROWS=4, BLOCK_K=8)
        assert torch.equal(out[:, :k], ordered.view(n, pitch)[:, :k]) and out[:, k:].isnan().all()
        assert not before.tickets.any() and given.tickets.data_ptr() == before.tickets[taken:].data_ptr()


def test_a_task_has_a_part_and_so_has_a_group_of_several():
    for tasks, group, groups in ((2, 8, 0), (8, 8, 0), (9, 8, 2), (128, 8, 16), (300, 10, 30)):
        found = join_tiles(torch.empty(0), tasks, 5, 3, _join.NO_JOIN, 4)
        assert (found.TASKS, found.GROUP, found.parts.shape) == (tasks, group, (tasks + groups, 5))
    assert join_tiles(torch.empty(0), 1, 5, 3, _join.NO_JOIN, 4)[:2] == (None, None)


@triton.jit
def counting_kernel(ticket_ptr, out_ptr, COUNT):
    if arrive(ticket_ptr, COUNT):
        tl.store(out_ptr, tl.load(out_ptr) + tl.program_id(0))


def test_one_program_of_a_launch_is_the_last():
    tickets, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    for count in (5, 1, 3):
        counting_kernel[(count,)](tickets, out, count)
    assert out.item() == 4 + 0 + 2 and tickets.item() == 0


@pytest.fixture
def gpu(monkeypatch):
    """Settings of a device that is none: its tickets lie on the CPU."""
    state, zeros = types.SimpleNamespace(stream=1, capturing=False, made=0), torch.zeros

    def made(*sizes, dtype, device):
        state.made += 1
        assert not state.capturing  # they would be zeros at the graph's replays alone
        return zeros(*sizes, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=state.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch, "zeros", made)
    for name in ("_tickets", "_spare_tickets"):
        monkeypatch.setattr(_triton, name, {})
    return state


def test_a_stream_has_tickets_of_its_own_which_stay(gpu):
    device = torch.device("cuda", 0)
    first = _triton.tickets(device, 5)
    assert _triton.tickets(device, _triton.TICKETS) is first and len(first) == _triton.TICKETS and gpu.made == 1
    gpu.stream = 2
    assert _triton.tickets(device, 5).data_ptr() != first.data_ptr()
    assert _triton.tickets(torch.device("cuda", 1), 5) is not _triton.tickets(device, 5)
    assert len(_triton.tickets(device, _triton.TICKETS + 1)) == _triton.TICKETS + 1  # these a launch has for itself


def test_a_capture_takes_tickets_that_were_zeroed_before_it(gpu):
    device, gpu.capturing = torch.device("cuda", 0), True
    with pytest.raises(RuntimeError, match="make the call once before, uncaptured"):
        _triton.tickets(device, 5)
    gpu.capturing = False
    places = {_triton.tickets(device, 5).data_ptr()}
    gpu.capturing = True
    for gpu.stream in range(2, 2 + _triton.SPARES):
        places.add(_triton.tickets(device, 5).data_ptr())
    assert len(places) == 1 + _triton.SPARES and gpu.made == 1
