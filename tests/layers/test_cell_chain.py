"""Cells whose convolutions run as one chain, as on a GPU: the same numbers as op by op, and what is left to be launched."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from norms import CL, needs_native, tensor
from own_conv import on_cpu
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.act_conv import chain_of
from nvae_fast.cells import Cell
from nvae_fast.layers import shared_effective_weights

pytestmark = needs_native
OPS = {"swish": ["res_bnswish"] * 2, "dilated": ["res_bnswish5", "res_bnswish"], "elu": ["res_bnelu"] * 3}


@pytest.fixture
def kernels():
    with on_cpu():
        yield


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.last: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        self.last[func.overloadpacket.__name__] = args
        return func(*args, **(kwargs or {}))


def make(ops: list[str], stride: int = 1, memory: str = "balanced") -> Cell:
    torch.manual_seed(0)
    cell = Cell(6, 6, ops, stride=stride, use_se=True).to(memory_format=CL)
    for m in cell.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.3), nn.init.normal_(m.bias)
        elif isinstance(m, nn.Conv2d) and m.bias is not None:
            nn.init.normal_(m.bias)
    for op in cell.ops:
        op.memory = memory
    return cell


def outcome(cell: Cell, size: int = 8, **options) -> dict[str, Tensor]:
    cell, x = copy.deepcopy(cell), tensor(3, 6, size, size, shift=0.5).requires_grad_()
    y, *passed = cell(x, **options, return_x=True)
    loss = (y * tensor(*y.shape, seed=1)).sum() + sum((t * tensor(*t.shape, seed=2)).sum() for t in passed if t.requires_grad)
    loss.backward()
    grads = {name: p.grad for name, p in cell.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | grads | dict(cell.named_buffers())


def alike(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    assert got.keys() == exact.keys()
    for name, t in exact.items():
        torch.testing.assert_close(got[name], t, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("memory", ["fast", "balanced"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stride", [1, 2, -1])
@pytest.mark.parametrize("ops", OPS.values(), ids=list(OPS))
def test_the_numbers_are_those_of_op_by_op(ops, stride, training, memory):
    """Of a cell of another stride the first op stays by itself."""
    cell, size = make(ops, stride, memory).train(training), 16 if stride == 2 else 8
    apart = outcome(cell, size)
    with on_cpu(), Calls() as calls:
        chained = outcome(cell, size)
    alike(chained, apart)
    inside = len(ops) - (stride != 1)
    assert calls.names["conv2d_fwd"] == calls.names["conv2d_bwd"] == inside
    assert calls.names["bn_act_fwd"] == calls.names["bn_act_sums"] == 0 or memory == "balanced" or stride != 1


@pytest.mark.parametrize("finished", [True, False])
def test_statistics_that_the_cell_before_has_taken(kernels, finished):
    """The chain takes them, or the whole normalisation, for its first norm."""
    cell, x = make(OPS["swish"]).train(), tensor(3, 6, 8, 8, shift=0.5)
    apart = outcome(cell)
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    stats, n = torch.stack((mean, var)), cell.first_norm
    if finished:
        moved = copy.deepcopy(cell)
        n = moved.first_norm
        stats = torch.ops.nvae_fast.bn_act_coefficients(
            stats, n.weight.detach(), n.bias.detach(), n.eps, *n[2:5], n.momentum, x.numel() / 6
        )
        cell.load_state_dict(moved.state_dict())
    with Calls() as calls:
        given = outcome(cell, stats=stats)
    alike(given, apart)
    assert calls.names["bn_act_stats"] == 0 and calls.names["bn_act_coefficients"] == (not finished)


@pytest.mark.parametrize("ops", OPS.values(), ids=list(OPS))
def test_the_chain_hands_its_means_to_squeeze_excitation(kernels, ops):
    """Which adds the bias that the last convolution leaves to it."""
    cell = make(ops)
    assert cell.ops[-1].conv.bias.abs().min() > 0
    with Calls() as calls:
        outcome(cell)
    _, x, bias, *_, means = calls.last["se_residual_fwd"][:8]
    torch.testing.assert_close(means, x.mean((2, 3)))
    assert torch.equal(bias, cell.ops[-1].conv.bias)


def chains(cell: Cell, size: int = 8) -> list[int]:
    ops, x, found = list(cell.ops), tensor(2, 6, size, size), []
    while ops:
        found.append(len(chain_of(ops, x)))
        ops = ops[found[-1] :]
    return found


def test_which_ops_are_one(kernels):
    for ops in OPS.values():
        assert chains(make(ops)) == [len(ops)]
        assert chains(make(ops, stride=2)) == chains(make(ops, stride=-1)) == [1, len(ops) - 1]
        assert chains(make(ops), size=4) == [1] * len(ops)
    assert chains(Cell(6, 6, ["res_elu"] * 2, stride=1, use_se=True)) == [1, 1]
    assert chains(Cell(6, 6, ["res_bnswish", "res_bnelu"], stride=1, use_se=True)) == [1, 1]
    assert chains(Cell(6, 6, ["res_bnswish", "res_bnswish", "mconv_e3k5g0"], stride=1, use_se=True)) == [1, 1, 1]
    biased = make(OPS["swish"])
    biased.ops[0].conv.adds_bias = True
    assert chains(biased) == [1, 1]


def test_off_a_gpu_no_op_is_one_with_another():
    assert chains(make(OPS["swish"])) == [1, 1]


def test_under_autocast_with_shared_weights(kernels):
    cell = make(OPS["swish"])
    convs = [op.conv for op in cell.ops]
    with torch.autocast("cpu", torch.bfloat16), shared_effective_weights(convs), Calls() as calls:
        y = cell(tensor(3, 6, 8, 8).bfloat16())
    assert y.dtype == torch.bfloat16 and calls.names["conv2d_fwd"] == 2 and calls.names["_to_copy"] < 10
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in cell.parameters())


PROCESSES = """
import copy, os, sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[3])
from own_conv import on_cpu
from nvae_fast.cells import Cell
from nvae_fast.layers import convert_sync_batch_norm
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
x, dy = torch.randn(2, 5, 6, 8, 8).contiguous(memory_format=torch.channels_last_3d)
rows = slice(0, 2) if rank == 0 else slice(2, 5)
whole = Cell(6, 6, ["res_bnswish"] * 2, stride=1, use_se=True).to(memory_format=torch.channels_last)
joined = convert_sync_batch_norm(copy.deepcopy(whole))

def run(module, x, dy):
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with on_cpu():
        y = module(x)
        dx, *grads = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return y.detach(), dx, grads, list(module.buffers())

y1, dx1, grads1, buffers1 = run(whole, x + 2, dy)
y, dx, grads, buffers = run(joined, x[rows] + 2, dy[rows])
for grad in grads:
    dist.all_reduce(grad)
for a, b in zip((y, dx, *grads, *buffers), (y1[rows], dx1[rows], *grads1, *buffers1), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts
"""


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    shared = str(Path(__file__).parents[1] / "ops")
    workers = [
        subprocess.Popen([sys.executable, "-c", PROCESSES, str(rank), str(tmp_path / "store"), shared],
                         env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
