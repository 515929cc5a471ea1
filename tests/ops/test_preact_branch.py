"""preact_branch: values and gradients as conv2d by conv2d, and as the chain that a GPU's kernels run."""

from __future__ import annotations

import pytest
import torch
from norms import CL, check, copied, image, leaf, needs_native, norm, outcome, preact, preact_weights, same, skipping, tensor
from own_conv import RAW, on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast import functional as F
from nvae_fast.kernels import _auto
from nvae_fast.kernels.conv2d import api, ops

# channels from x on, image, dilations: of one convolution, of two, of three
SHAPES = [((12, 5), (8, 8), [1]), ((5, 20, 7), (8, 16), [2, 1]), ((9, 9, 9, 4), (16, 8), [1, 2, 1])]


@pytest.fixture
def kernels():
    with on_cpu():
        yield


def arguments(channels, size, dilations, batch=2, **options):
    norms = [norm(c, seed=i, **options) for i, c in enumerate(channels[:-1])]
    norms[1:] = [n._replace(offset=tensor(len(n.weight), seed=9)) for n in norms[1:]]
    return [image(batch, channels[0], *size), *preact_weights(*channels)], norms


def chain(dilations, act="swish", **options):
    """Of the kernels, where a test asks for the native implementation."""
    return lambda t, n, i: preact(t, n, "triton" if i == "cpu" else i, act, dilations=dilations, **options)


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names += [func.overloadpacket.__name__] if func.namespace == "nvae_fast" else []
        return func(*args, **(kwargs or {}))


OFFSETS = tuple(f"doffset{i}" for i in range(3))  # 0 in theory behind statistics of the batch


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_chain(kernels, within_budget, shape, training, dtype):
    zero = OFFSETS if training else ()
    check(chain(shape[2]), *arguments(*shape, training=training), within_budget, dtype, zero)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPES[1], ((5, 20, 7), (7, 5), [2, 1])], ids=str)
def test_convolution_by_convolution(within_budget, shape, dtype):
    check(lambda t, n, i: preact(t, n, i, dilations=shape[2]), *arguments(*shape), within_budget, dtype, OFFSETS)


@needs_native
@pytest.mark.parametrize("act", ["identity", "elu"])
def test_activations(kernels, within_budget, act):
    check(chain([1, 2], act), *arguments(*SHAPES[1]), within_budget, zero=(*OFFSETS, "dbias0"))


@needs_native
@pytest.mark.parametrize("join", ["added", "beside twice"])
def test_x_passed_through(kernels, within_budget, join):
    channels = 6, 9, 6
    call = skipping(lambda t, n, i, **options: chain([1, 1], **options)(t, n, i), join)
    check(call, *arguments(channels, (8, 8), [1, 1]), within_budget, torch.bfloat16, OFFSETS)


@needs_native
@pytest.mark.parametrize("mixed", [0, 1])
def test_one_norm_of_fixed_statistics(kernels, within_budget, mixed):
    tensors, norms = arguments(*SHAPES[1])
    norms[mixed] = norms[mixed]._replace(training=False)
    check(chain([1, 1]), tensors, norms, within_budget, zero=OFFSETS[:1] if mixed else OFFSETS)


@needs_native
@pytest.mark.parametrize("options", [{}, dict(momentum=None), dict(training=False)], ids=str)
def test_what_is_asked_for(kernels, options):
    """Where the statistics of x are finished already: a launch for each convolution, and none between them, but where the
    rate depends on a counter. Backward is one for each and a last pass."""
    tensors, norms = arguments(*SHAPES[1], **options)
    if norms[0].training:
        raw = RAW.bn_act_stats(tensors[0])
        norms[0] = norms[0]._replace(stats=RAW.bn_act_coefficients(raw, norms[0].weight, norms[0].bias, 1e-5))
    leaves = [leaf(t) for t in tensors]
    with Operations() as forward:
        y = chain([1, 1])(leaves, [copied(n) for n in norms], "cpu")
    with Operations() as backward:
        y.sum().backward()
    between = [] if not options else ["bn_act_coefficients"]
    first = between if "training" in options else []
    assert forward.names == [*first, "conv2d_fwd", *between, "conv2d_fwd"]
    assert backward.names == ["conv2d_bwd"] * 2 + ["bn_act_affine_"]


@needs_native
def test_a_convolution_by_itself_is_a_chain_of_one(kernels):
    (x, weight), (n,) = arguments(*SHAPES[0])
    found = []
    for call in (lambda t, n, i: F.conv2d(*t, norm=n[0], act="swish", padding=1, impl=i), preact):
        with Operations() as seen:
            found.append(outcome(call, [x, weight], [n], "triton"))
        assert [name for name in seen.names if name.startswith("conv")] == ["conv2d_fwd", "conv2d_bwd"]
    same(*found)
    with Operations() as seen:  # a bias is not in the kernels
        F.conv2d(x, weight, tensor(5), norm=copied(n), padding=1, impl="triton")
    assert "conv2d_fwd" not in seen.names


@needs_native
def test_images_between_the_convolutions_are_all_that_is_kept_beside_x(kernels):
    tensors, norms = arguments(*SHAPES[2])
    leaves, kept = [leaf(t) for t in tensors], {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}), lambda t: t):
        chain([1, 1, 1])(leaves, [copied(n) for n in norms], "cpu")
    for t in leaves:
        assert kept.pop(t.data_ptr()) == t.numel()
    pixels = 2 * 16 * 8
    assert sorted(kept.values()) == sorted([9 * pixels] * 2 + [5 * 9] * 3)


@needs_native
def test_running_statistics_move_once_however_often_backward_runs(kernels):
    (x, *weights), norms = arguments(*SHAPES[1])
    norms, x = [copied(n) for n in norms], leaf(x)
    y = chain([1, 1])([x, *weights], norms, "cpu")
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for _ in range(2)))
    assert [n.num_batches_tracked.item() for n in norms] == [4, 4]


@needs_native
@pytest.mark.parametrize("wanted", [[0], [1], [2], [3], [1, 2]], ids=str)
def test_gradients_that_nobody_wants(kernels, wanted):
    """Of x, of either weight, of a norm alone: those that are wanted are what they are where all are."""
    tensors, norms = arguments(*SHAPES[1])
    found = []
    for some in (range(4), wanted):
        weight = norms[1].weight.clone()
        inputs = [*tensors, weight]
        inputs = [leaf(t) if i in some else t for i, t in enumerate(inputs)]
        with Operations() as seen:
            y = chain([1, 1])(inputs[:3], [copied(norms[0]), copied(norms[1])._replace(weight=inputs[3])], "cpu")
            grads = torch.autograd.grad(y, [inputs[i] for i in wanted], tensor(*y.shape, seed=3))
        assert seen.names.count("bn_act_affine_") == (0 in some)
        found.append(grads)
    assert all(map(torch.equal, *found)) and all(g.any() for g in found[0])


@needs_native
def test_only_what_is_handed_on_is_used(kernels):
    tensors, norms = arguments(*SHAPES[1])
    x = leaf(tensors[0])
    _, passed = chain([1, 1], return_x=1)([x, *tensors[1:]], norms, "cpu")
    assert torch.equal(torch.autograd.grad(2 * passed.sum(), x)[0], torch.full_like(x, 2))


@needs_native
def test_any_strides_and_an_empty_batch(kernels):
    tensors, norms = arguments(*SHAPES[1])
    strided = lambda t: t.mT.contiguous().mT if t.dim() == 4 else t  # noqa: E731
    call = chain([1, 2])
    same(outcome(call, tensors, norms, "cpu"), outcome(call, tensors, norms, "cpu", strided, strided))
    found = outcome(call, *arguments(*SHAPES[1], batch=0), "cpu")
    assert found["y0"].shape == (0, 7, 8, 16) and not any(t.any() for name, t in found.items() if name.startswith("d"))


@needs_native
def test_under_autocast(kernels):
    tensors, norms = arguments(*SHAPES[1])

    def call(t, n, i):
        with torch.autocast("cpu", torch.bfloat16):
            y, x = chain([1, 1], return_x=1)(t, n, i)
            assert x is t[0]
            return y

    found = outcome(call, tensors, norms, "cpu")
    assert found["y0"].dtype == torch.bfloat16 and found["d0"].dtype == found["d1"].dtype == torch.float32
    stored = outcome(chain([1, 1]), [t.bfloat16() for t in tensors], norms, "cpu")
    same(found, {k: t.to(found[k].dtype) for k, t in stored.items()})


@needs_native
def test_it_compiles_into_one_graph(kernels):
    torch._dynamo.reset()
    args = arguments(*SHAPES[1])
    compiled = torch.compile(chain([1, 1]), fullgraph=True, backend="aot_eager")
    same(outcome(chain([1, 1]), *args, "cpu"), outcome(compiled, *args, "cpu"))


@needs_native
def test_a_second_backward_is_refused_with_the_cure(kernels):
    (x, *weights), norms = arguments(*SHAPES[1])
    x = leaf(x)
    (first,) = torch.autograd.grad(chain([1, 1])([x, *weights], norms, "cpu").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^preact_branch: .* use impl='reference' to differentiate twice$"):
        first.square().sum().backward()


FORWARD = {
    "plain": lambda x, bn, w: (x, None, 2, w, 1, False),
    "stats": lambda x, bn, w: (x, bn, 1, w, 2, True),
    "followed": lambda x, bn, w: (
        *(x, bn, 1, w, 1, True, True, [1e-5, 0.1, 1.0]),
        *(tensor(7), tensor(7), None, tensor(7), tensor(7).abs(), torch.tensor(3)),
    ),
}
BACKWARD = {
    "plain": lambda x, bn, w, y: (y, None, None, x, None, 2, w, 1),
    "behind": lambda x, bn, w, y: (y, y, tensor(3, 7), x, bn, 1, w, 2, 40.0),
    "scaled": lambda x, bn, w, y: (y, y, tensor(2, 7), x, bn, 1, w, 1, float("inf")),
}


@needs_native
@pytest.mark.parametrize("layout", [torch.contiguous_format, CL])
def test_the_schemas(kernels, layout):
    """Shapes, layouts and what is written to are as the ops declare them."""
    x, y, w = (t.contiguous(memory_format=layout) for t in (image(2, 6, 8, 8), image(2, 7, 8, 8), tensor(7, 6, 3, 3)))
    for make in FORWARD.values():
        torch.library.opcheck(RAW.conv2d_fwd.default, make(x, tensor(5, 6), w))
    for make in BACKWARD.values():
        torch.library.opcheck(RAW.conv2d_bwd.default, make(x, tensor(5, 6), w, y))


def test_what_fits():
    def why(size=(8, 16), k=3, dtype=torch.float32, **sizes):
        return ops.fits(torch.empty(1, 2, *size, dtype=dtype), torch.empty(2, 2, k, k), **sizes)

    assert why() is why((64, 8), padding=2, dilation=2) is why(dtype=torch.float16) is None
    for reason, found in {
        "it takes float32, bfloat16 or float16, not float64": why(dtype=torch.float64),
        "1 or 2, not 5x5, stride 1, padding 2, dilation 1": why(k=5, padding=2),
        "not 3x3, stride 2, padding 1, dilation 1": why(stride=2),
        "not 3x3, stride 1, padding 0, dilation 1": why(padding=0),
        "not 3x3, stride 1, padding 3, dilation 3": why(padding=3, dilation=3),
        "sides are multiples of 8, not 8x12": why((8, 12)),
    }.items():
        assert found.endswith(reason), found


def test_who_asks_whether_the_kernels_run(kernels, monkeypatch):
    """Without their row in the table cuDNN convolves."""
    x, w = image(2, 6, 8, 8), tensor(7, 6, 3, 3)
    assert api.fused(x, w, impl="triton") and not api.fused(x, w, stride=2, impl="triton")
    assert not api.fused(x, w, impl="reference")
    monkeypatch.setattr(_auto, "TRITON", {})
    assert not api.fused(x, w, impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weights=[]), "0 weights, 2 norms, 0 dilations: expected as many of each, 1 at least"),
        (dict(norms=[norm(5)]), "2 weights, 1 norms, 2 dilations: expected"),
        (dict(dilations=[1]), "2 weights, 2 norms, 1 dilations: expected"),
        (dict(weights=preact_weights(5, 6, 4, k=4)), r"weights\[0\] has shape \(6, 5, 4, 4\): .* k, k\] with k odd"),
        (dict(weights=preact_weights(5, 7) + preact_weights(6, 4)), r"weights\[1\] has shape \(4, 6, 3, 3\): expected .*, 7"),
        (dict(weights=[*preact_weights(5, 6), tensor(4)]), r"weights\[1\] has shape \(4,\): expected \[C_out, 6"),
        (dict(norms=[norm(5), norm(5)]), r"weight of shape \(5,\): expected \(6,\), the channels of weights\[0\]"),
        (dict(dilations=[1, 0]), r"dilations\[1\] is 0: expected a whole number of at least 1"),
        (dict(dilations=[1, 1.5]), r"dilations\[1\] is float 1.5: expected a whole number$"),
        (dict(x=torch.zeros(5, 4, 4)), r"x has shape \(5, 4, 4\): expected \[N, C, H, W\]"),
        (dict(x=torch.zeros(1, 5, 1, 1)), "batch statistics need more than 1 value per channel"),
        (dict(x=torch.zeros(2, 5, 4, 4, device="meta")), "is on cpu: expected meta, where x is; move it there"),
        (dict(weights=[*preact_weights(5, 6), tensor(4, 6, 3, 3).half()]), r"weights\[1\] is torch.float16: expected .*32"),
        (dict(weights=[*preact_weights(5, 6), tensor(4, 6, 3, 3).to("meta")]), r"weights\[1\] is on meta: expected cpu"),
        (dict(act="relu"), "act 'relu': expected one of identity, swish, elu"),
        (dict(return_x=3), "return_x 3: expected how many others read x, 2 at most"),
        (dict(impl="cuda"), "conv2d has no 'cuda' implementation"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_before_anything_moves(change, message):
    norms = [norm(5), norm(6)]
    arguments = dict(x=torch.zeros(2, 5, 4, 4), weights=preact_weights(5, 6, 4), norms=norms, act="swish") | change
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message) as caught:
        F.preact_branch(**arguments)
    assert "\n" not in str(caught.value) and all(n.num_batches_tracked == 3 for n in norms)
