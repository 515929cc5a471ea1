"""bn_act against nn.BatchNorm2d and the activation, gradients, layouts, precisions, two processes, bad arguments."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast.kernels.bn_act import bn_act

ACTS = {"swish": F.silu, "elu": F.elu, "identity": lambda u: u}


def make(channels=5, batch=3, size=4, dtype=torch.float32, seed=0):
    """x with a mean far from 0 in units of its deviation, and random parameters and buffers."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(batch, channels, size, size, generator=g) * 0.7 + 2.0).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    weight, bias, mean = (torch.randn(channels, generator=g).to(wide) for _ in range(3))
    return x, weight, bias, mean, torch.rand(channels, generator=g).to(wide) + 0.5


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("momentum", [0.05, None])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bits_of_batch_norm(act, momentum, layout):
    module = torch.nn.BatchNorm2d(5, momentum=momentum)
    _, weight, bias, mean, var = make()
    module.load_state_dict(
        {
            "weight": weight,
            "bias": bias,
            "running_mean": mean,
            "running_var": var,
            "num_batches_tracked": torch.tensor(7),
        }
    )
    mean, var, count = mean.clone(), var.clone(), torch.tensor(7)
    for step, training in enumerate([True, True, False, True]):
        module.train(training)
        x = make(seed=step)[0].to(memory_format=layout).requires_grad_()
        expected = ACTS[act](module(x))
        y = bn_act(x, weight, bias, mean, var, count, training=training, momentum=momentum, act=act, impl="reference")
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for ours, theirs in (
            (mean, module.running_mean),
            (var, module.running_var),
            (count, module.num_batches_tracked),
        ):
            assert torch.equal(ours, theirs)
        dy = torch.randn(y.shape)
        assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)))
    assert count == 10


def test_without_affine_and_without_statistics():
    x = make()[0]
    for training in (True, False):
        y = bn_act(x, None, None, None, None, training=training, act="identity")
        assert torch.equal(y, torch.nn.BatchNorm2d(5, affine=False, track_running_stats=False)(x))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_first_and_second_order(act, training):
    x, weight, bias, mean, var = make(channels=2, batch=2, size=2, dtype=torch.float64)

    def f(x, weight, bias):
        return bn_act(x, weight, bias, mean.clone(), var.clone(), training=training, act=act)

    inputs = tuple(t.requires_grad_() for t in (x, weight, bias))
    assert gradcheck(f, inputs)
    assert gradgradcheck(f, inputs)


@pytest.mark.parametrize("training", [True, False])
def test_strided_inputs_and_gradients(training):
    x, weight, bias, mean, var = make(channels=6)
    buffer = torch.zeros(3, 9, 4, 5)
    buffer[:, 1:7, :, 1:] = x
    views = [buffer[:, 1:7, :, 1:], x.transpose(2, 3).contiguous().transpose(2, 3)]
    dense = x.clone().requires_grad_()
    y = bn_act(dense, weight, bias, mean.clone(), var.clone(), training=training)
    for make_dy in (
        lambda: torch.ones(1, 1, 1, 1).expand(y.shape),
        lambda: torch.randn(3, 4, 4, 6).permute(0, 3, 1, 2),
    ):
        dy = make_dy()
        (expected,) = torch.autograd.grad(y, dense, dy, retain_graph=True)
        for view in views:
            leaf = view.detach().requires_grad_()
            out = bn_act(leaf, weight, bias, mean.clone(), var.clone(), training=training)
            torch.testing.assert_close(out, y, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(torch.autograd.grad(out, leaf, dy)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ACTS)
def test_bfloat16(act):
    x, weight, bias, mean, var = make(dtype=torch.bfloat16, size=8)
    args = [x, weight, bias, mean.clone(), var.clone()]
    y = bn_act(*args, training=True, act=act)
    assert y.dtype == torch.bfloat16 and args[3].dtype == torch.float32
    exact_args = [t.double() for t in (x, weight, bias, mean, var)]
    exact = bn_act(*exact_args, training=True, act=act)
    plain = ACTS[act](F.batch_norm(x, mean.clone(), var.clone(), weight, bias, True, 0.05, 1e-5))
    eps = torch.finfo(torch.bfloat16).eps
    budget = 2 * ((plain.double() - exact).abs().max() + eps * exact.abs().max())
    assert (y.double() - exact).abs().max() <= budget
    # float32 inside: one rounding at the end.
    wide = bn_act(x.float(), weight, bias, mean.clone(), var.clone(), training=True, act=act)
    assert torch.equal(y, wide.bfloat16())
    torch.testing.assert_close(args[4].double(), exact_args[4], rtol=1e-6, atol=1e-6)


def test_buffers_in_low_precision_are_written_back():
    x, weight, bias, mean, var = make()
    low = [mean.bfloat16(), var.bfloat16()]
    wide = [t.float() for t in low]
    bn_act(x, weight, bias, *low, training=True, momentum=0.5)
    bn_act(x, weight, bias, *wide, training=True, momentum=0.5)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(low, wide, strict=True))


def test_autocast_changes_nothing():
    x, weight, bias, mean, var = make()
    expected = bn_act(x, weight, bias, mean, var, training=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(bn_act(x, weight, bias, mean, var, training=False), expected)


# Each process takes its rows of one batch (of unequal sizes) and compares with the whole batch on one process.
TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from nvae_fast.kernels.bn_act import bn_act
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
torch.manual_seed(0)
x = torch.randn(5, 4, 3, 3, dtype=torch.float64) + 10
dy = torch.randn_like(x)
weight, bias, mean, var = torch.randn(4), torch.randn(4), torch.randn(4), torch.rand(4) + 0.5
weight, bias, mean, var = (t.double() for t in (weight, bias, mean, var))

def run(x, dy, group):
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    buffers = [mean.clone(), var.clone(), torch.tensor(3)]
    y = bn_act(*leaves, *buffers, training=True, momentum=0.3, process_group=group)
    dx, *parameter_grads = torch.autograd.grad(y, leaves, dy)
    return y.detach(), dx, parameter_grads, buffers

rows = slice(0, 2) if rank == 0 else slice(2, 5)
y, dx, parameter_grads, buffers = run(x[rows], dy[rows], dist.group.WORLD)
for grad in parameter_grads:
    dist.all_reduce(grad)
y1, dx1, parameter_grads1, buffers1 = run(x, dy, None)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
close(y, y1[rows]), close(dx, dx1[rows]), close(parameter_grads, parameter_grads1), close(buffers, buffers1)
# One value per channel and process is enough for a joined batch.
bn_act(torch.full((1, 4, 1, 1), float(rank)), None, None, None, None, training=True, process_group=dist.group.WORLD)
dist.destroy_process_group()
"""


def test_two_processes_equal_one_with_the_joined_batch(tmp_path):
    command = [sys.executable, "-c", TWO_PROCESSES]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=60)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x of shape \(3, 5\).*\[B, C, H, W\]"),
        ({"x": torch.zeros(3, 5, 4, 4, dtype=torch.int64)}, "int64: expected a floating-point"),
        ({"x": torch.zeros(1, 5, 1, 1)}, "more than 1 value per channel; use a larger batch"),
        ({"act": "relu"}, "act 'relu': expected one of identity, swish, elu"),
        ({"weight": torch.zeros(4)}, r"weight of shape \(4,\): expected \(5,\)"),
        ({"running_var": None}, "both or neither"),
        ({"momentum": None}, "pass num_batches_tracked"),
        ({"impl": "fast"}, "unknown impl 'fast'"),
    ],
)
def test_bad_arguments(change, message):
    names = ("x", "weight", "bias", "running_mean", "running_var")
    arguments = dict(zip(names, make(), strict=True)) | {"training": True} | change
    with pytest.raises(ValueError, match=message) as caught:
        bn_act(**arguments)
    assert "\n" not in str(caught.value)
