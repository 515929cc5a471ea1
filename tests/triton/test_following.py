"""Kernels that finish the normalisation behind what they write: the program that joins a block of channels does so for them."""

from __future__ import annotations

import pytest
import torch
from followings import PRODUCERS, RAW, WAYS, calls, check_followed, check_next_norm
from norms import NATIVE, tensor

pytestmark = pytest.mark.usefixtures("triton_on_cpu")
OPS = "bn_act", "pointwise", "depthwise", "se"
# one task of one block of channels; several blocks, with a tail; several tasks; and those of `se` in a pass of their own
SIZES = {"small": (6, 4, 4), "blocks": (130, 4, 4), "tasks": (70, 8, 16), "no whole tiles": (33, 7, 5)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("op", OPS)
def test_what_the_two_ops_give_to_the_bit(op, size):
    check_followed(*calls(*SIZES[size])[op])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_parts_that_are_absent_or_of_other_types(op, way):
    check_followed(*calls(6, 4, 4)[op], **WAYS[way])


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_is_counted_and_moves_nothing(op):
    name, args, i = calls(6, 4, 4, batch=0)[op]
    check_followed(name, args, i)
    running, batches = [tensor(6), tensor(6)], torch.tensor(3)
    kept = [t.clone() for t in running]
    getattr(RAW, name)(*args, [0.1, 0.5, 1.0], None, None, None, *running, batches)
    assert batches == 4 and all(map(torch.equal, kept, running))


def test_many_tasks_are_joined_in_groups():
    check_followed(*calls(3, 64, 64, batch=3)["bn_act"])


@pytest.mark.parametrize("op", OPS)
def test_one_launch(launches, op):
    name, args, _ = calls(6, 4, 4)[op]
    moves = [0.1, 0.5, 1.0], None, None, None, tensor(6), tensor(6), torch.tensor(3)
    with launches() as plain:
        getattr(RAW, name)(*args)
    with launches() as told:
        getattr(RAW, name)(*args, *moves)
    assert plain == told and "bn_act_coefficients_kernel" not in told


@pytest.mark.skipif(NATIVE is None, reason="nvae_fast was installed without its native extension")
@pytest.mark.parametrize("op", OPS)
def test_the_native_code_gives_the_same(monkeypatch, op):
    ours = check_followed(*calls(33, 7, 5)[op])
    monkeypatch.undo()
    torch.testing.assert_close(check_followed(*calls(33, 7, 5)[op]), ours, rtol=1e-5, atol=1e-5)


def test_parts_that_do_not_fit_are_refused():
    x = calls(6, 4, 4)["bn_act"][1][0]
    for wrong, said in (
        (dict(weight=tensor(5)), "weight has shape"),
        (dict(mean=tensor(5), var=tensor(6)), "running statistics have shape"),
        (dict(mean=tensor(6)), "both running_mean and running_var"),
        (dict(batches=torch.zeros(2)), "the number of batches"),
    ):
        given = [wrong.get(n) for n in ("weight", "bias", "offset", "mean", "var", "batches")]
        with pytest.raises(RuntimeError, match=said):
            RAW.bn_act_stats(x, [0.1, 0.5, 1.0], *given)


@pytest.mark.parametrize("op", ["bn_act", "pointwise"])
@pytest.mark.parametrize("producer", PRODUCERS)
def test_a_normalisation_is_handed_on_once(producer, op):
    check_next_norm("triton", "triton", op, producer)
