"""With several processes gradients reach the parameters while the backward pass still runs, so that they can be sent."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nvae_fast.kernels import _impl
from nvae_fast.kernels.shared_weights import ops
from nvae_fast.layers import shared

from .stepping import Run

native = pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
SMALL = 2**11, 2**14  # bytes, for the tiny model


def trained(monkeypatch, limits, low=False):
    """What happens during the second backward pass, in order, and the gradients of every parameter."""
    with monkeypatch.context() as patch:
        patch.setattr(shared, "sends_gradients", lambda: limits is not None)
        patch.setattr(shared, "BUCKETS", limits)
        run = Run(precision="bf16" if low else "fp32")
        run()
        events, grads = [], {}
        for name, p in run.model.named_parameters():

            def arrived(p, name=name):
                events.append(name)
                grads[name] = p.grad.clone()

            p.register_post_accumulate_grad_hook(arrived)

        def seen(name):
            return lambda module, inputs, out: out.register_hook(lambda g: events.append(f"backward of {name}")) and None

        for name in ("stem", "enc0"):
            getattr(run.model, name).register_forward_hook(seen(name))
        run()
        assert grads.keys() == dict(run.model.named_parameters()).keys()
    return events, grads, run


@native
def test_the_last_layers_gradients_arrive_before_the_first_layers_backward(monkeypatch):
    events, _, run = trained(monkeypatch, SMALL)
    last = [f"image_conditional.{n}" for n, _ in run.model.image_conditional.named_parameters()]
    convolutions = [f"post_process.{n}.weight" for n, m in run.model.post_process.named_modules() if isinstance(m, nn.Conv2d)]
    assert len(last) == 3 and convolutions
    for name in (*last, *convolutions):
        assert events.index(name) < events.index("backward of enc0") < events.index("backward of stem"), name
    assert events.index("backward of stem") < events.index("stem.weight")
    events, _, _ = trained(monkeypatch, None)  # one process: together, at the end
    assert events.index("backward of stem") < events.index("image_conditional.1.weight")


@native
@pytest.mark.parametrize("low", [False, True], ids=["fp32", "bf16"])
def test_several_nodes_give_the_bits_of_one(monkeypatch, low):
    (_, one, run), (_, several, other), (_, order, _) = (trained(monkeypatch, limits, low) for limits in (None, SMALL, (1,)))
    assert all(torch.equal(g, several[name]) and torch.equal(g, order[name]) for name, g in one.items())
    assert run.everything() == other.everything()


@native
def test_without_a_way_to_put_nodes_first(monkeypatch):
    """As with a torch that lacks `_set_sequence_nr`."""
    _, one, _ = trained(monkeypatch, SMALL)
    plain = type("Plain", (), {"grad_fn": object()})
    put = ops.run_when_ready
    monkeypatch.setattr(ops, "run_when_ready", lambda result: put(plain))
    _, other, _ = trained(monkeypatch, SMALL)
    assert all(torch.equal(g, other[name]) for name, g in one.items())


def test_cuts():
    def runs(sizes, limits):
        return [sizes[part] for part in ops.cuts(sizes, limits)]

    assert runs([5, 1, 2, 3], ()) == [[5, 1, 2, 3]]
    assert runs([5, 1, 2, 3], (1, 3)) == [[5], [1, 2], [3]]
    assert runs([9, 1, 1, 1, 1, 1], (2, 3)) == [[9], [1, 1, 1], [1, 1]]
    assert runs([1, 1, 1], (2, 3)) == [[1], [1, 1]]
    assert runs([1], (100, 200)) == [[1]]
