"""Two gloo processes with uneven parts of a batch equal one process with all of it, in every layer and memory mode."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from norms import needs_native

# Each process takes its rows of one batch and compares with the whole batch on one process.
TWO_PROCESSES = """
import copy, os, sys, torch, torch.distributed as dist
from torch import nn
from nvae_fast.cells import Cell
from nvae_fast.kernels import use_impl
from nvae_fast.layers import BatchNormAct2d, InvertedResidual, convert_sync_batch_norm
rank, store, impl = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
x = (torch.randn(5, 6, 7, 5) + 2).contiguous(memory_format=torch.channels_last)
rows = slice(0, 2) if rank == 0 else slice(2, 5)

def run(module, x, dy):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with use_impl(impl):
        y = module(x)
    dx, *grads = torch.autograd.grad(y, [x, *module.parameters()], dy)
    return y.detach(), dx, grads, list(module.buffers())

def compare(name, module):
    for m in module.modules():
        if isinstance(m, BatchNormAct2d):
            m.momentum = 0.3
            nn.init.normal_(m.weight, 1.0, 0.3), nn.init.normal_(m.bias)
    joined = convert_sync_batch_norm(copy.deepcopy(module))
    with torch.no_grad():
        dy = torch.randn_like(copy.deepcopy(module)(x))
    y1, dx1, grads1, buffers1 = run(module, x, dy)
    y, dx, grads, buffers = run(joined, x[rows], dy[rows])
    for grad in grads:
        dist.all_reduce(grad)
    largest = max(g.abs().max().item() for g in grads1)

    def close(a, b, scale, what):
        error = (a.double() - b.double()).abs().max().item()
        assert error <= 2e-5 * max(scale, 1e-3), (name, impl, what, error, scale)

    close(y, y1[rows], y1.abs().max().item(), "y")
    close(dx, dx1[rows], dx1.abs().max().item(), "dx")
    for (key, _), a, b in zip(module.named_parameters(), grads, grads1, strict=True):
        close(a, b, largest, key)
    for (key, _), a, b in zip(module.named_buffers(), buffers, buffers1, strict=True):
        close(a, b, b.double().abs().max().item(), key)
    joined.eval(), module.eval()  # the running statistics of either, without another word between the processes
    if rank == 0:
        close(joined(x), module(x), y1.abs().max().item() + 1, "evaluation")

for act in ("identity", "swish", "elu"):
    compare("bn " + act, BatchNormAct2d(6, act=act))
for memory in ("fast", "balanced", "low"):
    for stride in (1, 2, -1):
        compare(f"branch {memory} {stride}", InvertedResidual(6, 4, expansion=3, kernel_size=3, stride=stride, memory=memory))
    cell = Cell(6, 6, ["mconv_e3k5g0", "mconv_e3k5g0"], stride=1, use_se=True)
    for op in cell.ops:
        op.memory = memory
    compare("cell " + memory, cell)
# One value per channel and process is enough for a joined batch.
one = torch.full((1, 6, 1, 1), float(rank)).contiguous(memory_format=torch.channels_last)
y = convert_sync_batch_norm(BatchNormAct2d(6))(one)
assert y.isfinite().all()
dist.barrier()  # neither leaves while the other still talks to it
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive the interpreter, which then aborts
"""


@pytest.mark.parametrize("impl", [pytest.param("auto", marks=needs_native), "reference"])
def test_two_processes_equal_one_with_the_joined_batch(tmp_path, impl):
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "store"), impl],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
