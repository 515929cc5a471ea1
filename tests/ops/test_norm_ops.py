"""What holds of every op with a batch normalisation: layouts, bits, empty batches, autocast, compiling, second derivatives."""

from __future__ import annotations

import pytest
import torch
from norms import CL, cases, copied, image, leaf, needs_native, norm, outcome, same, threads
from torch.autograd import gradcheck, gradgradcheck

from nvae_fast import functional as F
from nvae_fast.kernels import _impl

CASES = cases()
every = pytest.mark.parametrize("name", CASES)

LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels of a wider map": lambda t: torch.cat((t, t, t), 1).contiguous(memory_format=CL)[:, t.shape[1] : 2 * t.shape[1]],
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "window": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
}


def no_weights(arrange):
    """For images; biases become every second of twice as many."""
    image = lambda t: t.dim() == 4 and t.shape[2] * t.shape[3] > 9  # noqa: E731
    return lambda t: arrange(t) if image(t) else t.repeat_interleave(2)[::2] if t.dim() == 1 else t


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every
def test_any_strides_of_inputs_and_gradients_give_the_same_bits(name, dtype):
    call, tensors, norms = CASES[name]
    tensors = [t.to(dtype) for t in tensors]
    dense = outcome(call, tensors, norms, "cpu")
    for layout in LAYOUTS.values():
        arrange = no_weights(layout)
        same(dense, outcome(call, tensors, norms, "cpu", arrange, arrange))
        same(dense, outcome(call, tensors, norms, "cpu", arrange_dy=arrange))


@needs_native
@every
def test_an_expanded_gradient(name):
    call, tensors, norms = CASES[name]
    found = [outcome(call, tensors, norms, "cpu", arrange_dy=f) for f in
             (lambda t: torch.ones(()).expand_as(t), torch.ones_like)]  # fmt: skip
    same(*found)


class Silent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return 2 * y

    @staticmethod
    def backward(ctx, dy):
        return None


@needs_native
@every
def test_what_reads_y_may_have_no_gradient_for_it(name):
    call, tensors, norms = CASES[name]
    leaves = list(map(leaf, tensors))
    y = call(leaves, list(map(copied, norms)), "cpu")
    (3 * leaves[0].sum() + Silent.apply(y).sum()).backward()
    assert leaves[0].grad.eq(3).all() and all(t.grad is None or not t.grad.any() for t in leaves[1:])


@needs_native
@pytest.mark.parametrize("name", ["bn_act", "pointwise", "depthwise", "branch", "se"])
def test_bits_depend_neither_on_threads_nor_on_the_run(name):
    call, tensors, norms = cases(batch=9)[name]
    tensors = [t.repeat(1, 1, 3, 4).contiguous(memory_format=CL) if t.dim() == 4 and t.shape[2] > 3 else t for t in tensors]
    found = []
    for count in (1, 2, 3, 1):
        with threads(count):
            found.append(outcome(call, tensors, norms, "cpu"))
    for other in found[1:]:
        same(found[0], other)


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_native), "reference"])
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("bn_act eval",)])
def test_an_empty_batch(name, impl):
    call, tensors, norms = cases(batch=0)[name]
    norms = [n._replace(training=False) for n in norms]
    found = outcome(call, tensors, norms, impl)
    assert found["y0"].shape[0] == 0 and found["d0"].shape == tensors[0].shape
    assert all(t.isfinite().all() for t in found.values())
    assert all(not t.any() for key, t in found.items() if key.startswith("d"))


@needs_native
@every
def test_an_empty_batch_in_training_moves_nothing(name):
    call, tensors, norms = cases(batch=0)[name]
    found = outcome(call, tensors, norms, "cpu")
    assert found["y0"].shape[0] == 0
    assert all(t.isfinite().all() and not t.any() for key, t in found.items() if key.startswith("d"))


@needs_native
@every
def test_nan_reaches_the_same_elements_as_in_the_reference(name):
    call, tensors, norms = CASES[name]
    poisoned = [t.clone(memory_format=torch.preserve_format) for t in tensors]
    poisoned[0][1, 3, 2, 1] = torch.nan
    for training in (True, False):
        modes = [n._replace(training=training) for n in norms]
        cpu, reference = (outcome(call, poisoned, modes, impl) for impl in ("cpu", "reference"))
        assert cpu["y0"].isnan().any()
        for key in ("y0", "d0"):
            assert torch.equal(cpu[key].isnan(), reference[key].isnan()), (key, training)


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_native), "reference"])
@every
def test_autocast(name, impl):
    """Convolutions follow autocast, as nn.Conv2d does; the others keep the dtype of their input."""
    call, tensors, norms = CASES[name]

    def under_autocast(t, n, impl):
        with torch.autocast("cpu", torch.bfloat16):
            return call(t, n, impl)

    mixed = outcome(under_autocast, tensors, norms, impl)
    convolution = not name.startswith(("bn_act", "se"))
    assert mixed["y0"].dtype == (torch.bfloat16 if convolution else torch.float32)
    assert mixed["d0"].dtype == torch.float32
    if not convolution:
        same(mixed, outcome(call, tensors, norms, impl))


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_native), "reference"])
@every
def test_compiles_without_a_graph_break(name, impl):
    call, tensors, norms = CASES[name]
    torch._dynamo.reset()

    def compiled(t, n, impl):
        return torch.compile(lambda t, n: call(t, n, impl), fullgraph=True, backend="aot_eager")(t, n)

    eager, found = outcome(call, tensors, norms, impl), outcome(compiled, tensors, norms, impl)
    for key, t in eager.items():
        torch.testing.assert_close(found[key], t, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@needs_native
@every
def test_a_second_backward_is_refused_with_the_cure(name):
    call, tensors, norms = CASES[name]
    leaves = [leaf(t) for t in tensors]
    y = call(leaves, [copied(n) for n in norms], "cpu")
    (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="use impl='reference' to differentiate twice") as error:
        first.square().sum().backward()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bn_act", "pointwise", "depthwise", "branch", "se"])
def test_the_second_derivative_goes_through_the_reference(name):
    call, tensors, norms = CASES[name]
    leaves = [leaf(t) for t in tensors]
    with _impl.use_impl("reference"):
        y = call(leaves, [copied(n) for n in norms], "auto")
    (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    first.square().sum().backward()
    assert leaves[0].grad.isfinite().all() and leaves[0].grad.any()


def small(name):
    """The case of that name in float64, small enough for numerical derivatives."""
    x = image(2, 2, 3, 2)
    if name == "se":
        gate = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate([(2, 2), (2,), (2, 2), (2,)])]
        tensors, channels = [x, image(2, 2, 3, 2, seed=1), *gate], []
    elif name.startswith("branch"):
        tensors, channels = [x, image(3, 2, 1, 1), image(3, 1, 3, 3), image(2, 3, 1, 1)], [2, 3, 3, 2]
    else:
        weight = {"pointwise": (3, 2, 1, 1), "depthwise": (2, 1, 3, 3)}
        tensors, channels = [x] + [image(*s, mean=0.3) for key, s in weight.items() if name.startswith(key)], [2]
    return [t.double() for t in tensors], [copied(norm(c, seed=i), torch.float64) for i, c in enumerate(channels)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", ["bn_act", "pointwise", "depthwise", "depthwise stride 2", "depthwise upsample", "branch", "se"]
)
def test_the_references_derivatives_of_both_orders(name, training):
    tensors, norms = small(name)
    count = len(tensors)

    def f(*args):
        own = [
            n._replace(weight=args[count + 2 * i], bias=args[count + 2 * i + 1], running_mean=n.running_mean.clone(),
                       running_var=n.running_var.clone(), num_batches_tracked=None, training=training)
            for i, n in enumerate(norms)
        ]  # fmt: skip
        return CASES[name][0](args[:count], own, "reference")

    inputs = [leaf(t) for t in (*tensors, *(t for n in norms for t in (n.weight, n.bias)))]
    assert gradcheck(f, inputs, fast_mode=True)
    assert gradgradcheck(f, inputs, fast_mode=True)


@needs_native
@pytest.mark.parametrize("memory", ["fast", "balanced", "low", None])
def test_running_statistics_move_once_per_call(memory):
    """Against nn.BatchNorm2d's rule, in every op and memory mode, the count by one."""
    for name, (call, tensors, norms) in CASES.items():
        if memory and not name.startswith("branch"):
            continue
        if memory:
            call = lambda t, n, i: F.inverted_residual(*t, n, memory=memory, impl=i)  # noqa: E731
        found = [outcome(call, tensors, norms, impl) for impl in ("cpu", "reference")]
        for i, n in enumerate(norms):
            assert found[0][f"count{i}"] == n.num_batches_tracked + (1 if n.training else 0)
            for key in (f"mean{i}", f"var{i}"):
                torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-6, atol=1e-6)
                before = n.running_mean if key.startswith("mean") else n.running_var
                assert torch.equal(found[0][key], before) != n.training
