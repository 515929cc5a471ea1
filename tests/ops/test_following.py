"""Native ops that finish the normalisation behind what they write."""

from __future__ import annotations

import pytest
import torch
from followings import PRODUCERS, RAW, WAYS, calls, check_followed, check_next_norm
from norms import copied, needs_native, norm, se_tensors, tensor

from nvae_fast import functional as F

pytestmark = needs_native
OPS = "bn_act", "pointwise", "depthwise", "se"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch", [0, 2])
def test_what_the_two_ops_give_to_the_bit(op, way, batch):
    check_followed(*calls(33, 7, 5, batch=batch)[op], **WAYS[way])


@pytest.mark.parametrize("op", OPS)
def test_parts_that_do_not_fit_are_refused(op):
    name, args, _ = calls(6, 4, 4)[op]
    for numbers, given, said in (
        ([0.1, 0.5, 1.0], [tensor(5)], "weight has shape"),
        ([0.1, 0.5, 1.0], [None, None, None, tensor(5), tensor(6)], "running statistics have shape"),
        ([0.1, 0.5, 1.0], [None, None, None, tensor(6)], "both running_mean and running_var"),
        ([0.1, 0.5, 1.0], [None] * 5 + [torch.zeros(2)], "the number of batches"),
        ([0.1, 0.5], [], "expected 3 numbers"),
    ):
        with pytest.raises(RuntimeError, match=said):
            getattr(RAW, name)(*args, numbers, *given)


@pytest.mark.parametrize("behind", ["cpu", "reference"])
@pytest.mark.parametrize("op", ["bn_act", "dense", "pointwise", "depthwise", "branch"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_normalisation_is_handed_on_once(producer, op, behind):
    check_next_norm("cpu", behind, op, producer)


@pytest.mark.parametrize("options", [dict(momentum=None), dict(training=False)], ids=str)
@pytest.mark.parametrize("producer", PRODUCERS)
def test_what_is_averaged_or_fixed_is_left_to_the_op_behind(producer, options):
    check_next_norm("cpu", "cpu", "dense", producer, **options)


def test_a_next_norm_that_does_not_fit_is_refused():
    args, n = se_tensors(2, 6, 5, 4), norm(6)
    with pytest.raises(ValueError, match=r"weight of shape \(5,\): expected \(6,\)"):
        F.se_residual(*args, next_norm=n._replace(weight=tensor(5)))
    w = tensor(6, 6, 1, 1)
    with pytest.raises(ValueError, match=r"weight of shape \(5,\): expected \(6,\)"):
        F.pointwise_conv(args[0], w, return_stats=True, next_norm=n._replace(weight=tensor(5)))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.pointwise_conv(args[0][:1, :, :1, :1], w, return_stats=True, next_norm=n)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        F.se_residual(*(t[:1, :, :1, :1] for t in args[:2]), *args[2:], next_norm=n)
    assert n.num_batches_tracked == 3
    for stats, training, said in (
        (tensor(4, 6), True, r"expected \(2, 6\)"),
        (tensor(5, 6), False, "a finished normalisation"),
    ):
        with pytest.raises(ValueError, match=said):
            F.conv2d(args[0], tensor(4, 6, 3, 3), norm=n._replace(stats=stats, training=training))


def test_it_compiles_into_one_graph():
    args, n, w = se_tensors(2, 6, 5, 4), norm(6), tensor(4, 6, 3, 3)

    def two(n, *args):
        y, stats = F.se_residual(*args, next_norm=n, impl="cpu")
        return F.conv2d(y, w, norm=n._replace(stats=stats), impl="cpu")

    compiled = torch.compile(two, fullgraph=True, backend="aot_eager")
    found = []
    for f in (two, compiled):
        leaves, mine = [t.clone().requires_grad_() for t in args], copied(n)
        y = f(mine, *leaves)
        found.append([y, *torch.autograd.grad(y.sum(), leaves), *mine[2:5]])
    assert found[0][-1] == 4 and all(map(torch.equal, *found))
