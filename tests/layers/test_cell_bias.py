"""Biases of a cell's convolutions, which the BN or the residual sum behind them adds: the numbers of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as tf
from norms import CL, needs_native, tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast.cells import ActConv, Cell
from nvae_fast.kernels import use_impl
from nvae_fast.layers import WeightNormConv2d, shared_effective_weights

OPS = {"bn swish": ["res_bnswish"] * 2, "bn elu": ["res_bnelu", "res_bnswish5"], "elu": ["res_elu"] * 2, "one": ["res_bnelu"]}
IMPLS = ["reference", pytest.param("auto", marks=needs_native)]


def make(ops: list[str], *, stride: int = 1, use_se: bool = True) -> Cell:
    torch.manual_seed(0)
    cell = Cell(6, 6, ops, stride=stride, use_se=use_se).to(memory_format=CL)
    for m in cell.modules():
        if isinstance(m, WeightNormConv2d):
            m.data_init_pending = False
            if m.bias is not None:
                nn.init.normal_(m.bias, 1.0)
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.3
            nn.init.normal_(m.weight, 1.0, 0.3), nn.init.normal_(m.bias)
    return cell


def plain(cell: Cell, x: Tensor) -> Tensor:
    """The definition, of a cell in float64."""
    y = x
    for op in cell.ops:
        if op.bn is not None:
            bn = op.bn
            y = tf.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum, bn.eps)
        y = tf.silu(y) if op.act == "swish" else tf.elu(y)
        if op.upsample:
            y = tf.interpolate(y, scale_factor=2, mode="nearest")
        w, conv = op.conv.normalised(), op.conv
        y = tf.conv2d(y, w, conv.bias, conv.stride, conv.padding, conv.dilation)
    if cell.se is not None:
        h = torch.relu(cell.se.reduce(y.mean((2, 3))))
        y = y * torch.sigmoid(cell.se.expand(h))[:, :, None, None]
    return cell.skip(x) + 0.1 * y


def outcome(run, cell: Cell, dtype: torch.dtype, impl: str) -> dict[str, Tensor]:
    cell, x = copy.deepcopy(cell).to(dtype), tensor(3, 6, 8, 6, shift=0.5).to(dtype).requires_grad_()
    with use_impl(impl):
        y = run(cell, x)
    y.backward(tensor(*y.shape, seed=1).to(dtype))
    grads = {name: p.grad for name, p in cell.named_parameters()}
    found = {"y": y.detach(), "x": x.grad, **grads, **dict(cell.named_buffers())}
    return {name: t for name, t in found.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("memory", ["fast", "balanced"])
@pytest.mark.parametrize(("stride", "use_se"), [(1, True), (1, False), (-1, True)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ops", OPS.values(), ids=list(OPS))
def test_values_gradients_and_statistics(ops, training, stride, use_se, memory, impl):
    cell = make(ops, stride=stride, use_se=use_se).train(training)
    for op in cell.ops:
        op.memory = memory
    got, exact = outcome(lambda c, x: c(x), cell, torch.float32, impl), outcome(plain, cell, torch.float64, "reference")
    largest = max(t.abs().max().item() for t in exact.values())
    for name, t in exact.items():
        torch.testing.assert_close(got[name].double(), t, rtol=1e-4, atol=3e-6 * largest, msg=lambda m, n=name: f"{n}: {m}")
    assert exact["ops.0.conv.bias"].any() and all(got[n].any() for n in got if n.endswith("conv.bias") and n[:5] != "ops.0")


@needs_native
def test_the_gradient_of_a_bias_before_a_batchs_statistics_is_exactly_zero():
    for training in (True, False):
        grad = outcome(lambda c, x: c(x), make(OPS["bn swish"]).train(training), torch.float32, "auto")["ops.0.conv.bias"]
        assert grad.any() != training and grad.shape == (6,)


class Biases(TorchDispatchMode):
    """Of each convolution and each backward of one, whether it is asked for a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.found.append(args[2] is not None)
        elif name == "convolution_backward":
            self.found.append(args[-1][2])
        return func(*args, **(kwargs or {}))


@needs_native
@pytest.mark.parametrize("memory", ["fast", "balanced"])
def test_convolutions_neither_add_a_bias_nor_sum_its_gradient(memory):
    cell = make(OPS["bn swish"])
    for op in cell.ops:
        op.memory = memory
    with Biases() as seen:
        cell(tensor(3, 6, 8, 6).requires_grad_()).sum().backward()
    assert seen.found == [False] * 4
    cell.ops[0].conv.adds_bias = True
    with Biases() as seen:
        cell(tensor(3, 6, 8, 6).requires_grad_()).sum().backward()
    assert seen.found == [True, False, False, True]


def test_no_convolution_adds_a_bias_but_one_before_an_activation_alone():
    added = {name: [op.conv.adds_bias for op in make(ops).ops] for name, ops in OPS.items()}
    assert added == {"bn swish": [False] * 2, "bn elu": [False] * 2, "elu": [True, False], "one": [False]}
    mixed = Cell(6, 6, ["res_bnswish", "mconv_e3k5g0"], stride=1, use_se=True)
    assert mixed.ops[0].conv.adds_bias  # a branch would have to hand it to its first norm
    assert ActConv(6, 6, act="swish", bn=True, stride=1, dilation=1).conv.adds_bias


def test_initialising_from_data_sets_the_biases_before_they_are_added():
    x = tensor(3, 6, 8, 6)
    cells = [Cell(6, 6, OPS["elu"], stride=1, use_se=True) for _ in range(2)]
    cells[1].load_state_dict(cells[0].state_dict())
    for op in cells[1].ops:
        op.conv.data_init_pending = True
    first, second = cells[1](x), cells[1](x)
    assert torch.equal(first, second) and not any(op.conv.data_init_pending for op in cells[1].ops)
    branch = tf.elu(x)
    for op in cells[1].ops:
        branch = tf.conv2d(branch, op.conv.normalised(), op.conv.bias, padding=1)
        assert branch.mean((0, 2, 3)).abs().max() < 1e-5
        assert (branch.std((0, 2, 3)) - 0.2).abs().max() < 1e-3
        branch = tf.elu(branch)


@needs_native
def test_under_autocast_the_biases_are_never_rounded():
    cell, found = make(OPS["bn swish"]), {}
    for dtype in (torch.float32, torch.bfloat16):
        twin, x = copy.deepcopy(cell), tensor(3, 6, 8, 6)
        convs = [m for m in twin.modules() if isinstance(m, WeightNormConv2d)]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), shared_effective_weights(convs):
            assert all(getattr(conv, "effective_bias", None) is None for conv in convs)
            twin(x).backward(tensor(3, 6, 8, 6, seed=1))
        found[dtype] = [p.grad for p in twin.parameters()]
        assert not any(g is None for g in found[dtype])
    for a, b in zip(*found.values(), strict=True):
        assert (a - b).abs().max() <= 0.05 * max(b.abs().max().item(), 1.0)
