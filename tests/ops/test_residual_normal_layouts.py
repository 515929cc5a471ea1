"""residual_normal in every layout: the same bits, and shapes that the operators' schemas promise."""

from __future__ import annotations

import pytest
import torch

from nvae_fast.kernels import _impl
from nvae_fast.kernels import residual_normal as rn

native = pytest.mark.skipif(_impl.load_native()[0] is None, reason="built without the native extension")
SHAPE = (2, 3, 5, 7)


def inputs(shape=SHAPE, dtype=torch.float32, parameters=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for _ in range(parameters)], torch.randn(shape, generator=g)


def weights(shape=SHAPE):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=g) for s in (shape, shape[:2], shape[:2], shape[:2])]


def outputs(tensors, noise, arrange=lambda t: t, arrange_sum=lambda t: t):
    """Outputs and gradients of a weighted sum of all outputs, the weights too arranged in memory."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = rn.residual_normal(*leaves, noise=noise, impl="cpu")
    dz, *sums = weights(noise.shape)
    return [*out, *torch.autograd.grad(out, leaves, [arrange(dz.to(out.z.dtype)), *map(arrange_sum, sums)])]


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "half of the channels": lambda t: torch.cat([t, t], 1).chunk(2, 1)[1],
    "half of the channels, channels_last": lambda t: LAYOUTS["channels_last"](torch.cat([t, t], 1)).chunk(2, 1)[0],
    "window of a larger map": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 3))[:, :, 1:-3, 1:-2],
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [SHAPE, (2, 20, 16, 16), (1, 70, 17, 19)])  # one tile; whole tiles; several groups and blocks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_in_and_back(layout, shape, dtype):
    tensors, noise = inputs(shape, dtype)
    arrange = LAYOUTS[layout]
    found = outputs([arrange(t) for t in tensors], arrange(noise), arrange, lambda g: g.t().contiguous().t())
    for a, b in zip(found, outputs(tensors, noise), strict=True):
        assert torch.equal(a, b)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_its_own_for_every_tensor(layout, dtype):
    """The order of the work is that of mu_q; everything else is read and written in its own."""
    tensors, noise = inputs((2, 20, 16, 16), dtype)
    expected = outputs(tensors, noise)
    for i in range(5):
        args = [*tensors, noise]
        args[i] = LAYOUTS[layout](args[i])
        found = outputs(args[:4], args[4])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@native
def test_expanded_tensors_and_gradients():
    noise = torch.randn(4, 3, 5, 7)
    small = [torch.randn(1, 3, 1, 1, requires_grad=True) for _ in range(4)]

    def gradients(impl):
        out = rn.residual_normal(*(t.expand(noise.shape) for t in small), noise, impl=impl)
        return torch.autograd.grad(out.z.sum() + out.kl.sum() + 2 * out.log_q.mean() - out.log_p.sum(), small)

    for a, b in zip(gradients("cpu"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@native
@pytest.mark.parametrize("prior", ["none", "given", "residual"])
@pytest.mark.parametrize("layout", ["contiguous", *LAYOUTS])
def test_opcheck(prior, layout):
    arrange = LAYOUTS.get(layout, torch.Tensor.contiguous)
    tensors, noise = inputs(parameters=2 if prior == "none" else 4)
    params = [arrange(t) for t in tensors] + [None] * (4 - len(tensors))
    args = (*params, arrange(noise), prior == "residual")
    dz, *sums = (w.float() for w in weights())
    bias = weights()[1].float()[0].repeat(2)[::1]
    torch.library.opcheck(torch.ops.nvae_fast.residual_normal_fwd, args)
    torch.library.opcheck(torch.ops.nvae_fast.residual_normal_fwd, (*args, bias))
    backward = torch.ops.nvae_fast.residual_normal_bwd
    torch.library.opcheck(backward, (arrange(dz), *sums, *(params[2:] if prior == "given" else (None, None)), *args, False))
    torch.library.opcheck(backward, (None, sums[0], *[None] * 4, *args, True))
    torch.library.opcheck(backward, (None, sums[0], *[None] * 4, *args, True, bias))


@native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_thread_count_does_not_change_a_bit(layout):
    tensors, noise = inputs((5, 7, 33, 31))
    tensors = [LAYOUTS.get(layout, torch.Tensor.contiguous)(t) for t in tensors]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(outputs(tensors, noise))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
