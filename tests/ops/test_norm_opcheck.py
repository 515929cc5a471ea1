"""Every raw op behind the ops with a batch normalisation: schema, shapes, aliasing and mutation as declared."""

from __future__ import annotations

import pytest
import torch
from norms import CL, NATIVE, image, needs_native, se_tensors, tensor

pytestmark = needs_native
RAW = torch.ops.nvae_fast
ARRANGED = {
    "float32": lambda t: t,
    "bfloat16": torch.Tensor.bfloat16,
    "transposed": lambda t: t.mT.contiguous().mT if t.shape[2] * t.shape[3] > 1 else t,
}


def arguments() -> dict[str, tuple]:
    """Arguments by name of the op and of the variant: with and without each optional part."""
    x, y = image(2, 6, 5, 4), image(2, 6, 5, 4, seed=1)
    stats = RAW.bn_act_stats(x)
    weight, bias, c = tensor(6), tensor(6, seed=1), tensor(3, 6)
    bn = RAW.bn_act_coefficients(stats, weight, bias, 1e-5)
    expand, joint, taps = tensor(4, 6, 1, 1), tensor(4, 12, 1, 1), tensor(6, 1, 3, 3)
    wide, strided, doubled = image(2, 4, 5, 4), image(2, 6, 3, 2), image(2, 6, 10, 8)
    skip, _, w1, b1, w2, b2 = se_tensors(2, 6, 5, 4)
    state, ungated = (
        RAW.se_residual_fwd(skip, x, None, *gate, None, 0.1, False)[1] for gate in ((w1, b1, w2, b2), (None,) * 4)
    )
    moves = [1e-5, 0.1, 1.0], weight, bias, None, tensor(6), tensor(6).abs(), torch.tensor(3)
    return {
        "bn_act_stats": (x,),
        "bn_act_stats followed": (x, *moves),
        "pointwise_conv_fwd followed": (x, bn, 1, tensor(6, 6, 1, 1), True, True, None, None, None, *moves),
        "depthwise_conv_fwd followed": (x, bn, 1, taps, 1, 1, 1, True, *moves),
        "depthwise_conv_fwd followed plain": (x, bn, 1, taps, 1, 1, 1, True, [1e-5, 0.1, 1.0]),
        "se_residual_fwd followed": (skip, x, bn, w1, b1, w2, b2, None, 0.1, True, *moves),
        "bn_act_coefficients": (stats, weight, bias, 1e-5),
        "bn_act_coefficients plain": (stats, None, None, 1e-5),
        "bn_act_coefficients moves": (stats, weight, bias, 1e-5, tensor(6), tensor(6).abs(), torch.tensor(3), 0.1, 40.0),
        "bn_act_coefficients offset": (
            *(stats, weight, bias, 1e-5, tensor(6), tensor(6).abs(), torch.tensor(3), 0.1, 40.0, tensor(6)),
        ),
        "bn_act_coefficients averages": (stats, weight, bias, 1e-5, tensor(6), tensor(6).abs(), torch.tensor(3), None, 40.0),
        "bn_act_gradients": (tensor(2, 6), bn, 40.0),
        "bn_act_gradients fixed": (tensor(2, 6), bn, float("inf")),
        "bn_act_fwd": (x, bn, 1),
        "bn_act_sums": (y, x, bn, 2, 40.0),
        "bn_act_bwd": (y, x, bn, 1, c),
        "bn_act_bwd also": (y, x, bn, 1, c, skip),
        "bn_act_bwd also2": (y, x, bn, 1, c, skip, x),
        "bn_act_affine_": (y.clone(memory_format=torch.preserve_format), x, c),
        "bn_act_affine_ also": (y.clone(memory_format=torch.preserve_format), x, c, skip),
        "bn_act_affine_ also2": (y.clone(memory_format=torch.preserve_format), x, c, skip, y),
        "pointwise_conv_fwd": (x, bn, 1, expand, True, True),
        "pointwise_conv_fwd plain": (x, None, 0, expand, False, False),
        "pointwise_conv_bwd": (wide, wide, tensor(3, 4), x, bn, 1, expand, 40.0),
        "pointwise_conv_bwd scaled": (wide, wide, tensor(2, 4), x, bn, 1, expand, 40.0),
        "pointwise_conv_bwd plain": (wide, None, None, x, None, 0, expand),
        "pointwise_conv_fwd beside": (x, None, 2, joint, True, False, bias[:4], wide, y),
        "pointwise_conv_bwd beside": (wide, None, None, x, None, 2, joint, 0.0, True, skip, y),
        "depthwise_conv_fwd": (x, bn, 1, taps, 1, 1, 1, True),
        "depthwise_conv_fwd stride": (x, None, 0, taps, 2, 2, 1, False),
        "depthwise_conv_fwd upsample": (x, bn, 2, taps, 1, 1, 2, True),
        "depthwise_conv_bwd": (y, y, c, x, bn, 1, taps, 1, 1, 1, 40.0),
        "depthwise_conv_bwd stride": (strided, None, None, x, None, 0, taps, 2, 1, 1),
        "depthwise_conv_bwd upsample": (doubled, doubled, c, x, bn, 1, taps, 1, 1, 2),
        "depthwise_conv_bwd_": (y.clone(memory_format=torch.preserve_format), x, c, x, bn, 1, taps, 1, 40.0),
        "depthwise_conv_bwd_ plain": (y.clone(memory_format=torch.preserve_format), None, None, x, None, 0, taps, 2),
        "se_residual_fwd": (skip, x, bn, w1, b1, w2, b2, None, 0.1, True),
        "se_residual_fwd bias": (skip, x, bias, w1, b1, w2, b2, None, 0.1, True),
        "se_residual_fwd means": (skip, x, None, w1, b1, w2, b2, x.mean((2, 3)), 0.1, False),
        "se_residual_fwd plain": (skip, x, None, None, None, None, None, None, 0.1, False),
        "se_residual_bwd": (y, x, bn, w1, w2, state, 0.1),
        "se_residual_bwd bias": (y, x, bias, w1, w2, state, 0.1),
        "se_residual_bwd bias alone": (y, x, bias, None, None, ungated, 0.1),
        "se_residual_bwd plain": (y, x, None, None, None, ungated, 0.1),
    }


ARGUMENTS = arguments() if NATIVE else {}


@pytest.mark.parametrize("arranged", ARRANGED)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_opcheck(name, arranged):
    args = [ARRANGED[arranged](t) if isinstance(t, torch.Tensor) and t.dim() == 4 else t for t in ARGUMENTS[name]]
    torch.library.opcheck(getattr(RAW, name.split()[0]).default, args)


@pytest.mark.parametrize("name", [n for n in ARGUMENTS if n.split()[0].endswith(("fwd", "bwd"))])
def test_images_come_out_channels_last_as_declared(name):
    op, args = getattr(RAW, name.split()[0]), ARGUMENTS[name]
    found, declared = op(*args), op(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (found, declared)), strict=True):
        assert a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
        assert a.dim() != 4 or a.shape[2:] == (1, 1) or a.is_contiguous(memory_format=CL) or a.shape == args[-4:]


def test_disagreeing_shapes_are_refused_by_the_raw_ops():
    """No call from Python reaches memory that is not there."""
    for name, args in ARGUMENTS.items():
        op = getattr(RAW, name.split()[0])
        for i, t in enumerate(args):
            if not isinstance(t, torch.Tensor) or t.dim() == 0 or (name.endswith("stats") and i == 0):
                continue
            wrong = torch.zeros([n + 1 for n in t.shape])
            with pytest.raises(RuntimeError):
                op(*args[:i], wrong, *args[i + 1 :])
