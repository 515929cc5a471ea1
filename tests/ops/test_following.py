"""Native ops that finish the normalisation behind what they write."""

from __future__ import annotations

import pytest
import torch
from followings import RAW, WAYS, calls, check_followed
from norms import needs_native, tensor

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
