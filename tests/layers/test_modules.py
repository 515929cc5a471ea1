"""The layers on the normalised ops: keys and numbers of the torch modules they replace, repr, copies, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from norms import CL, image, needs_native, tensor
from torch import nn

from nvae_fast import functional as F
from nvae_fast.cells import Cell
from nvae_fast.layers import (
    BatchNormAct2d,
    DepthwiseConvBNAct,
    InvertedResidual,
    PointwiseConvBNAct,
    ResidualNormal,
    SqueezeExcite,
    convert_sync_batch_norm,
)

ACTS = {"swish": nn.SiLU, "elu": nn.ELU, "identity": nn.Identity}


def depthwise(act="swish", stride=1, dilation=1):
    conv = nn.Conv2d(9, 9, 5, stride, 2 * dilation, dilation, groups=9, bias=False)
    return DepthwiseConvBNAct(9, 5, stride=stride, dilation=dilation, act=act), nn.Sequential(
        conv, nn.BatchNorm2d(9), ACTS[act]()
    )


def pointwise(act="swish"):
    conv = nn.Conv2d(9, 7, 1, bias=False)
    return PointwiseConvBNAct(9, 7, act=act), nn.Sequential(conv, nn.BatchNorm2d(7), ACTS[act]())


PAIRS = {
    **{f"depthwise {act}": lambda act=act: depthwise(act) for act in ACTS},
    "depthwise stride 2": lambda: depthwise(stride=2),
    "depthwise dilation 2": lambda: depthwise(dilation=2),
    **{f"pointwise {act}": lambda act=act: pointwise(act) for act in ACTS},
}


@pytest.mark.parametrize("layout", [CL, torch.contiguous_format])
@pytest.mark.parametrize("name", PAIRS)
def test_keys_and_numbers_of_the_sequence_it_replaces(name, layout):
    torch.manual_seed(0)
    ours, theirs = PAIRS[name]()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    nn.init.normal_(theirs[1].weight), nn.init.normal_(theirs[1].bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for step, training in enumerate([True, True, False, True]):
        ours.train(training), theirs.train(training)
        found = []
        for module in (ours, theirs):
            x = image(3, 9, 8, 7, seed=step).to(memory_format=layout).requires_grad_()
            y = module(x)
            found.append((y, *torch.autograd.grad(y, [x, *module.parameters()], tensor(*y.shape))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours[1].num_batches_tracked == 3


@needs_native
@pytest.mark.parametrize("pair", [depthwise, pointwise])
def test_keeps_two_images_for_backward(pair):
    module, kept = pair()[0], {}
    x = image(2, 9, 16, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t):
        module(x)
    assert sum(n >= x.numel() // 2 for n in kept.values()) == 2


def test_residual_normal_is_the_function():
    posterior, prior, noise = torch.randn(2, 6, 4, 3), torch.randn(2, 6, 4, 3), torch.randn(2, 3, 4, 3)
    out = ResidualNormal()(posterior, prior, noise)
    expected = F.residual_normal(*posterior.chunk(2, 1), *prior.chunk(2, 1), noise)
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True)) and out.z.shape == (2, 3, 4, 3)
    alone = ResidualNormal(residual=False)(posterior, noise=noise)
    assert torch.equal(alone.z, F.residual_normal(*posterior.chunk(2, 1), None, None, noise, residual=False).z)
    absolute = ResidualNormal(residual=False)(posterior, prior, noise)
    assert torch.equal(absolute.kl, F.residual_normal(*posterior.chunk(2, 1), *prior.chunk(2, 1), noise, residual=False).kl)
    assert not list(ResidualNormal().parameters()) and not ResidualNormal().state_dict()
    for bad, words in (((posterior[:, :5], None), r"\(2, 5, 4, 3\): expected \[B, 2 Z, h, w\]"),
                       ((posterior, prior[:1]), r"prior has shape \(1, 6, 4, 3\): expected that of posterior"),
                       ((posterior[0], None), r"posterior has shape \(6, 4, 3\)")):  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            ResidualNormal()(*bad)
        assert "\n" not in str(error.value)


MODULES = {
    "act=elu": lambda: BatchNormAct2d(4, act="elu"),
    "act=swish, sync": lambda: convert_sync_batch_norm(BatchNormAct2d(4)),
    "DepthwiseConvBNAct": lambda: DepthwiseConvBNAct(4),
    "PointwiseConvBNAct": lambda: PointwiseConvBNAct(4, 4),
    "InvertedResidual": lambda: InvertedResidual(4, 4, memory="low"),
    "SqueezeExcite": lambda: SqueezeExcite(4),
    "Cell": lambda: Cell(4, 4, ["mconv_e6k5g0"], stride=1, use_se=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_repr_and_deepcopy(name):
    module = MODULES[name]()
    assert name in repr(module)
    twin, x = copy.deepcopy(module), image(2, 4, 5, 4)
    assert repr(twin) == repr(module) and torch.equal(twin(x), module(x))
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert p is not q and torch.equal(p, q)
    assert not isinstance(module, InvertedResidual) or twin.memory == "low"


def test_repr_and_deepcopy_of_residual_normal():
    assert repr(copy.deepcopy(ResidualNormal(residual=False))) == "ResidualNormal(residual=False)"


def test_bad_arguments_of_layers():
    with pytest.raises(ValueError, match="act 'relu': expected one of identity, swish, elu"):
        BatchNormAct2d(4, act="relu")
    with pytest.raises(ValueError, match="memory='none': expected one of fast, balanced, low"):
        InvertedResidual(4, 4, memory="none")


def test_torchs_own_conversion_is_refused_in_one_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    with pytest.raises(TypeError, match="would drop the activation.*use nvae_fast.layers.convert_sync_batch_norm") as error:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert "\n" not in str(error.value)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)), nn.SyncBatchNorm)


def test_conversion_touches_its_own_modules_only():
    model = nn.Sequential(nn.BatchNorm2d(4), Cell(4, 4, ["mconv_e6k5g0"], stride=1, use_se=True))
    assert convert_sync_batch_norm(model) is model and not isinstance(model[0], nn.SyncBatchNorm)
    assert all(m.sync for m in model.modules() if isinstance(m, BatchNormAct2d))
    convert_sync_batch_norm(model, sync=False)
    assert not any(m.sync for m in model.modules() if isinstance(m, BatchNormAct2d))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_compile_without_a_graph_break(backend):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(DepthwiseConvBNAct(4, 3), PointwiseConvBNAct(4, 4), InvertedResidual(4, 4, kernel_size=3))
    if backend == "aot_eager":  # Inductor takes its time
        model.append(Cell(4, 4, ["mconv_e6k5g0"], stride=1, use_se=True))
    model = model.to(memory_format=CL)
    twin, x = copy.deepcopy(model), image(2, 4, 5, 4)
    found = []
    for f, m in ((torch.compile(model, fullgraph=True, backend=backend), model), (twin, twin)):
        y = f(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(m.parameters())), *m.buffers()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
