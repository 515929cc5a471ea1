"""preact_branch as a chain of conv2d's own kernels, in Triton's interpreter, and an encoder cell on it."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from norms import CL, image, leaf, norm, outcome, preact, preact_weights, same, tensor
from torch import nn

from nvae_fast.cells import Cell
from nvae_fast.kernels import use_impl

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
RAW = torch.ops.nvae_fast
CASES = [(torch.float32, True, [1, 2]), (torch.float16, True, [1, 1]), (torch.float32, False, [2, 1])]


def arguments(*channels, batch=1, **options):
    norms = [norm(c, seed=i, **options) for i, c in enumerate(channels[:-1])]
    return [image(batch, channels[0], 8, 8), *preact_weights(*channels)], norms


@pytest.mark.parametrize(("dtype", "training", "dilations"), CASES)
def test_values_and_gradients(check, dtype, training, dilations):
    tensors, norms = arguments(5, 12, 4, training=training)
    check(lambda t, n, i: preact(t, n, i, dilations=dilations), tensors, norms, dtype, 3)


def test_reruns_and_strides_give_the_same_bits():
    sliced = lambda t: torch.cat((t, t), 1)[:, t.shape[1] :] if t.shape[1] > 1 else t  # noqa: E731
    same(*(outcome(preact, *arguments(5, 4, 6), "triton", f, f) for f in (lambda t: t, sliced)))


def test_an_empty_batch():
    found = outcome(preact, *arguments(5, 4, 6, batch=0), "triton")
    assert found["y0"].shape == (0, 6, 8, 8) and not any(t.any() for name, t in found.items() if name.startswith("d"))


BACKWARD = Counter(conv2d_du_kernel=2, conv2d_dweight_kernel=2, bn_act_affine_kernel=1)


def test_launches_of_a_chain(launches):
    """The first normalisation being finished: nothing but the convolutions forward; backward two for each and a last pass,
    which adds what comes back to another reader of x. No operation of torch."""
    tensors, norms = arguments(5, 4, 5)
    table = RAW.bn_act_coefficients(RAW.bn_act_stats(tensors[0]), norms[0].weight, norms[0].bias, 1e-5)
    norms = [n._replace(weight=leaf(n.weight), bias=leaf(n.bias)) for n in norms]
    norms[0] = norms[0]._replace(stats=table)
    leaves = [leaf(t) for t in tensors]
    with launches() as forward:
        found = preact(leaves, norms, "triton", return_x=1)
    dys = [tensor(*t.shape, seed=5) for t in found]
    with launches() as backward:
        torch.autograd.grad(found, [*leaves, *(p for n in norms for p in n[:2])], dys)
    assert forward == ["conv2d_fwd_kernel"] * 2 and Counter(backward) == BACKWARD and BACKWARD.total() == 5


@pytest.mark.parametrize("memory", ["fast", "balanced"])
def test_an_encoder_cell(launches, memory):
    """It follows the plain composition, and launches the same in every memory mode."""
    torch.manual_seed(0)
    cell = Cell(5, 5, ["res_bnswish"] * 2, stride=1, use_se=True).to(memory_format=CL)
    for op in cell.ops:
        op.memory = memory
        nn.init.normal_(op.conv.bias)
    found = []
    for impl in ("auto", "reference"):
        twin, x = copy.deepcopy(cell), image(2, 5, 8, 8).requires_grad_()
        with use_impl(impl):
            with launches() as forward:
                y = twin(x)
            with launches() as backward:
                grads = torch.autograd.grad(y, [x, *twin.parameters()], tensor(*y.shape, seed=1))
        found.append([y, *grads, *twin.buffers()])
        if impl == "auto":
            kernels = [name for name in forward if name.endswith("_kernel") or name.startswith("torch.conv")]
            own = {"bn_act_stats_kernel": 1, "conv2d_fwd_kernel": 2, "se_residual_fwd_kernel": 1}
            assert {name: n for name, n in Counter(kernels).items() if name != "weight_norm_fwd_kernel"} == own
            assert not BACKWARD - Counter(backward) and "torch.convolution_backward" not in backward
    largest = max(t.abs().max().item() for t in found[1][1:] if t.is_floating_point())
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * largest)
