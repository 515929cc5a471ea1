"""Norm(offset=...): a bias that x lacks. Statistics of the batch take it away, all but the running mean; fixed ones do not."""

from __future__ import annotations

import pytest
import torch
from norms import (
    bn_act,
    branch,
    branch_norms,
    branch_tensors,
    check,
    copied,
    dense,
    image,
    needs_native,
    norm,
    outcome,
    same,
    tensor,
)

from nvae_fast import functional as F
from nvae_fast.kernels import _impl

CASES = {
    "bn_act": (bn_act, [image(2, 20, 7, 5)]),
    "dense": (lambda t, n, i: dense(t, n, i, padding=1), [image(2, 20, 7, 5), tensor(9, 20, 3, 3, scale=0.1), tensor(9)]),
    "branch": (branch, branch_tensors(2, 20, 30, 7, 6, 5)),
}


def norms(op: str, **options) -> list[F.Norm]:
    found = branch_norms(20, 30, 7, **options) if op == "branch" else [norm(20, **options)]
    return [n._replace(offset=tensor(len(n.weight), shift=2.0, seed=i)) for i, n in enumerate(found)]


@needs_native
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", CASES)
def test_values_and_gradients(within_budget, op, training):
    call, tensors = CASES[op]
    zero = [f"doffset{i}" for i in range(4)] + ["dbias3"] * (op == "branch")
    check(call, tensors, norms(op, training=training), within_budget, zero=zero if training else ())


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("op", CASES)
def test_the_running_mean_alone_moves_by_it_in_training(op, impl):
    call, tensors = CASES[op]
    wide = [t.double() for t in tensors] if impl == "reference" else tensors
    given = [copied(n, wide[0].dtype) for n in norms(op, momentum=0.25)]
    found = outcome(call, wide, given, impl)
    plain = outcome(call, wide, [n._replace(offset=None) for n in given], impl)
    for i, n in enumerate(given):
        torch.testing.assert_close(found.pop(f"mean{i}"), plain.pop(f"mean{i}") + 0.25 * n.offset)
        slope = found.pop(f"doffset{i}")
        assert slope.abs().max() < 1e-10 if impl == "reference" else not slope.any()
    (torch.testing.assert_close if impl == "reference" else same)(found, plain)


@needs_native
def test_nan_in_a_channel_is_nan_in_its_gradient():
    x, offset = image(2, 9, 4, 3), tensor(9).requires_grad_()
    x[1, 4, 2, 1] = torch.nan
    F.bn_act(x.requires_grad_(), None, None, None, None, training=True, offset=offset, impl="cpu").sum().backward()
    assert offset.grad.isnan().tolist() == [i == 4 for i in range(9)] and not offset.grad.nan_to_num(0.0).any()


def test_arguments_that_do_not_fit_are_refused():
    x = image(2, 9, 4, 3)
    for offset, said in (
        (torch.zeros(8), r"offset of shape \(8,\): expected \(9,\)"),
        (torch.zeros(9, dtype=torch.int64), "offset is"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            F.bn_act(x, None, None, None, None, training=True, offset=offset)
    if _impl.load_native()[0] is not None:
        with pytest.raises(RuntimeError, match="offset has shape"):
            torch.ops.nvae_fast.bn_act_coefficients(torch.ones(2, 9), None, None, 0.1, offset=torch.ones(8))
