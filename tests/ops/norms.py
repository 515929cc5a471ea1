"""What the tests of the ops with a batch normalisation share: inputs, outcomes, comparison with float64, a table of calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nvae_fast import functional as F
from nvae_fast.kernels import _impl

NATIVE = _impl.load_native()[0]
needs_native = pytest.mark.skipif(NATIVE is None, reason="nvae_fast was installed without its native extension")
CL = torch.channels_last

Call = Callable[[Sequence[Tensor], Sequence[F.Norm], str], "Tensor | tuple[Tensor, ...]"]


def _instruction_sets() -> list[str]:
    if NATIVE is None:
        return []
    before = NATIVE.instruction_set()
    found = [name for name in NATIVE.build_info()["instruction_sets"] if NATIVE.use_instruction_set(name)]
    NATIVE.use_instruction_set(before)
    return found


SETS = _instruction_sets()


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = NATIVE.instruction_set()
    assert NATIVE.use_instruction_set(name)
    try:
        yield
    finally:
        NATIVE.use_instruction_set(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensor(*shape: int, scale: float = 1.0, shift: float = 0.0, seed: int = 0) -> Tensor:
    """Numbers that bfloat16 represents, so that every dtype sees the same; images channels-last."""
    g = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 7)))
    t = (torch.randn(shape, generator=g) * scale + shift).bfloat16().float()
    return t.contiguous(memory_format=CL) if t.dim() == 4 else t


def image(*shape: int, mean: float = 1.5, seed: int = 0) -> Tensor:
    return tensor(*shape, shift=mean, seed=seed)


def norm(channels: int, *, training: bool = True, seed: int = 0, **options) -> F.Norm:
    """Parameters and buffers that are nobody's default."""
    weight, bias, mean = (tensor(channels, scale=0.3, shift=s, seed=seed + i) for i, s in enumerate((1.0, 0.1, 0.2)))
    var = tensor(channels, scale=0.2, seed=seed + 3).abs() + 0.5
    return F.Norm(weight, bias, mean, var, torch.tensor(3), training=training, **options)


def copied(n: F.Norm, dtype: torch.dtype = torch.float32) -> F.Norm:
    """Tensors of its own, the floating-point ones in `dtype`."""
    return n._replace(
        **{
            name: t.to(dtype, copy=True) if t.is_floating_point() else t.clone()
            for name, t in zip(n._fields, n, strict=True)
            if isinstance(t, Tensor)
        }
    )


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def outcome(
    call: Call, tensors: Sequence[Tensor], norms: Sequence[F.Norm], impl: str, arrange=lambda t: t, arrange_dy=lambda t: t
) -> dict[str, Tensor]:
    """Outputs, gradients of tensors and of the norms' parameters, and where the running statistics went, by name."""
    leaves = [leaf(t) for t in tensors]
    norms = [copied(n, n.weight.dtype) for n in norms]
    learned = [[name for name in ("weight", "bias", "offset") if getattr(n, name) is not None] for n in norms]
    norms = [n._replace(**{name: leaf(getattr(n, name)) for name in names}) for n, names in zip(norms, learned, strict=True)]
    parameters = [getattr(n, name) for n, names in zip(norms, learned, strict=True) for name in names]
    y = call([arrange(t) for t in leaves], norms, impl)
    outputs = y if isinstance(y, tuple) else (y,)
    dy = tensor(*outputs[0].shape, seed=5).to(outputs[0].dtype)
    grads = torch.autograd.grad(outputs[0], leaves + parameters, arrange_dy(dy))
    found = {f"y{i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"d{i}": t for i, t in enumerate(grads[: len(leaves)])}
    names = [f"d{name}{i}" for i, names in enumerate(learned) for name in names]
    found |= dict(zip(names, grads[len(leaves) :], strict=True))
    for i, n in enumerate(norms):
        if n.running_mean is not None:
            found |= {f"mean{i}": n.running_mean, f"var{i}": n.running_var, f"count{i}": n.num_batches_tracked}
    return found


DRAWS = 4  # a single draw of the plain op's error says little where a result has few elements


def check(call: Call, tensors, norms, within_budget, dtype=torch.float32, zero=(), plain_dtype=None) -> None:
    """The native outcome is within the budget, with every instruction set; errors are pooled over draws. `zero` names gradients
    that are 0 in theory: their yardstick is the largest gradient instead of their own size. A chain of normalisations is
    granted one unit in the last place for each: each folds scale and shift, which rounds once. `plain_dtype` is that of
    the plain op's run where it is not `dtype`."""
    found: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ("exact", "plain", *SETS)}
    for draw in range(DRAWS):
        drawn = [shuffled(t, draw) for t in tensors]
        wide = [t.double() for t in drawn], [copied(n, torch.float64) for n in norms]
        found["exact"].append(outcome(call, *wide, "reference"))
        drawn = [t.to(dtype) for t in drawn]
        plain = outcome(call, [t.to(plain_dtype or dtype) for t in drawn], norms, "reference")
        found["plain"].append({name: t.to(dtype) if name[0] in "yd" and name[1:].isdigit() else t for name, t in plain.items()})
        for isa in SETS:
            with instruction_set(isa):
                found[isa].append(outcome(call, drawn, norms, "cpu"))
                assert found[isa][-1]["y0"].is_contiguous(memory_format=CL)
    pooled = {who: {name: torch.stack([d[name] for d in draws]) for name in draws[0]} for who, draws in found.items()}
    exact, plain = pooled.pop("exact"), pooled.pop("plain")
    largest = max(t.abs().max().item() for name, t in exact.items() if name.startswith("d") and t.numel())
    for isa, got in pooled.items():
        for name, truth in exact.items():
            try:
                if name.startswith("count"):
                    assert torch.equal(got[name], truth), "batches counted"
                else:
                    own = max(len(norms), 1) * truth.abs().max().item()
                    within_budget(got[name], plain[name], truth, dtype, largest if name in zero else own)
            except AssertionError as problem:
                raise AssertionError(f"{name} with {isa}: {problem}") from None


def check_stats(stats: Tensor, y: Tensor) -> None:
    """Mean and variance of y as it is stored, to eight units in the last place of the largest second moment."""
    var, mean = torch.var_mean(y.detach().double(), (0, 2, 3), correction=0)
    assert stats.dtype == torch.float32 and not stats.requires_grad
    error, largest = (stats.double() - torch.stack((mean, var))).abs().max(), (mean.square() + var).max()
    assert error <= 8 * torch.finfo(torch.float32).eps * largest, f"{error:.2e} of {largest:.2e}"


def shuffled(t: Tensor, draw: int) -> Tensor:
    """Another draw of the same numbers; the first is t itself."""
    if draw == 0:
        return t
    order = torch.randperm(t.numel(), generator=torch.Generator().manual_seed(draw))
    return torch.empty_like(t).copy_(t.flatten()[order].view(t.shape))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """To the bit, NaN included."""
    for name, t in a.items():
        assert t.dtype == b[name].dtype and torch.equal(t.nan_to_num(7e7), b[name].nan_to_num(7e7)), name


def bn_act(t, n, impl, act="swish", **options):
    return F.bn_act(t[0], *n[0][:5], training=n[0].training, momentum=n[0].momentum, eps=n[0].eps, act=act, impl=impl,
                    stats=n[0].stats, offset=n[0].offset, **options)  # fmt: skip


def pointwise(t, n, impl, act="swish", **options):
    return F.pointwise_conv(t[0], t[1], norm=n[0] if n else None, act=act if n else "identity", impl=impl, **options)


def with_all(t, n, impl, **options):
    """Of x, weight, bias, what stands beside x, what is added to y."""
    return F.pointwise_conv(*t[:3], beside=t[3], addend=t[4], act="elu", impl=impl, **options)


def depthwise(t, n, impl, act="swish", **options):
    return F.depthwise_conv(t[0], t[1], norm=n[0] if n else None, act=act if n else "identity", impl=impl, **options)


def dense(t, n, impl, act="swish", **options):
    return F.conv2d(*t, norm=n[0], act=act, impl=impl, **options)


def preact(t, n, impl, act="swish", **options):
    return F.preact_branch(t[0], t[1:], n, act=act, impl=impl, **options)


def branch(t, n, impl, **options):
    return F.inverted_residual(*t, n, impl=impl, **options)


JOINS = {  # of what a branch made of x with x itself: the gradient that comes back to x is dense, strided, or all there is
    "added": lambda y, x: y + x.to(y.dtype),
    "beside": lambda y, x: torch.cat((y, x.to(y.dtype)), 1),
    "x alone": lambda y, x: x + 0 * y.detach().to(x.dtype),
    "y alone": lambda y, x: y,
    "twice": lambda y, x, x2: y + x.to(y.dtype) - 2 * x2.to(y.dtype),
    "beside twice": lambda y, x, x2: torch.cat((x2.to(y.dtype), y, x.to(y.dtype)), 1),
    "second": lambda y, x, x2: y + x2.to(y.dtype),
    "both alone": lambda y, x, x2: x - 2 * x2 + 0 * y.detach().to(x.dtype),
}


def skipping(op, join="added", passed=True, **options):
    """Calls op(t, n, impl) and joins with x, `passed` through the op or read by both."""

    def call(t, n, impl):
        readers = JOINS[join].__code__.co_argcount - 1
        y, *xs = op(t, n, impl, return_x=readers, **options) if passed else (op(t, n, impl, **options), *[t[0]] * readers)
        return JOINS[join](y, *xs)

    return call


def se(t, n, impl, **options):
    """Of skip and x, then the four of the gate or none, then a bias or none."""
    skip, x, *rest = t
    gate, bias = (rest[:-1], rest[-1]) if len(rest) % 4 else (rest, None)
    return F.se_residual(skip, x, *(gate or (None,) * 4), bias=bias, impl=impl, **options)


def preact_weights(*channels, k=3):
    return [tensor(o, c, k, k, scale=(k * k * c) ** -0.5) for c, o in pairwise(channels)]


def branch_tensors(batch, channels, hidden, out, h, w, k=3):
    return [image(batch, channels, h, w), tensor(hidden, channels, 1, 1, scale=0.3), tensor(hidden, 1, k, k, scale=0.3),
            tensor(out, hidden, 1, 1, scale=0.2)]  # fmt: skip


def branch_norms(channels, hidden, out, **options):
    return [norm(c, seed=i, **options) for i, c in enumerate((channels, hidden, hidden, out))]


def se_tensors(batch, channels, h, w, hidden=4):
    return [image(batch, channels, h, w), image(batch, channels, h, w, seed=1), tensor(hidden, channels, scale=0.3),
            tensor(hidden, shift=0.5), tensor(channels, hidden, scale=0.5), tensor(channels)]  # fmt: skip


def cases(batch: int = 2) -> dict[str, tuple[Call, list[Tensor], list[F.Norm]]]:
    """One call of each public op by name, small, with channel tails: for what must hold of all of them."""
    x, w = image(batch, 20, 7, 5), tensor(20, 1, 3, 3, scale=0.3)
    mix = branch_tensors(batch, 6, 20, 7, 6, 5), branch_norms(6, 20, 7)
    return {
        "bn_act": (bn_act, [x], [norm(20)]),
        "bn_act passes x": (skipping(bn_act), [x], [norm(20)]),
        "bn_act passes x twice": (skipping(bn_act, "beside twice"), [x], [norm(20)]),
        "bn_act eval": (bn_act, [x], [norm(20, training=False)]),
        "pointwise": (pointwise, [x, tensor(9, 20, 1, 1)], [norm(20)]),
        "pointwise plain": (pointwise, [x, tensor(9, 20, 1, 1)], []),
        "pointwise with all": (
            skipping(with_all),
            [x, tensor(20, 25, 1, 1, scale=0.2), tensor(20), image(batch, 5, 7, 5, seed=1), tensor(batch, 20, 7, 5, seed=2)],
            [],
        ),
        "depthwise": (depthwise, [x, w], [norm(20)]),
        "depthwise plain": (depthwise, [x, w], []),
        "depthwise stride 2": (lambda t, n, i: depthwise(t, n, i, stride=2), [x, w], [norm(20)]),
        "depthwise upsample": (lambda t, n, i: depthwise(t, n, i, upsample=2), [x, w], [norm(20)]),
        "dense": (lambda t, n, i: dense(t, n, i, padding=1), [x, tensor(9, 20, 3, 3, scale=0.1), tensor(9)], [norm(20)]),
        "dense stride 2": (
            lambda t, n, i: dense(t, n, i, padding=1, stride=2),
            [x, tensor(9, 20, 3, 3, scale=0.1)],
            [norm(20)],
        ),
        "dense passes x": (skipping(dense, padding=1), [x, tensor(20, 20, 3, 3, scale=0.1), tensor(20)], [norm(20)]),
        "preact": (preact, [x, *preact_weights(20, 9, 4)], [norm(20), norm(9)]),
        "preact passes x": (
            lambda t, n, i: skipping(preact, dilations=[2, 1])(t, n, i),
            [x, *preact_weights(20, 9, 20)],
            [norm(20), norm(9)],
        ),
        "branch": (branch, *mix),
        "branch passes x": (skipping(branch), branch_tensors(batch, 6, 20, 6, 6, 5), branch_norms(6, 20, 6)),
        "branch passes x twice": (
            skipping(branch, "beside twice"),
            branch_tensors(batch, 6, 20, 6, 6, 5),
            branch_norms(6, 20, 6),
        ),
        "branch low": (lambda t, n, i: branch(t, n, i, memory="low"), *mix),
        "branch stride 2": (lambda t, n, i: branch(t, n, i, stride=2, memory="fast"), *mix),
        "branch upsample": (lambda t, n, i: branch(t, n, i, upsample=2), *mix),
        "se": (se, se_tensors(batch, 20, 5, 3), []),
        "se with a bias": (se, [*se_tensors(batch, 20, 5, 3), tensor(20, shift=1.0)], []),
        "se without gate": (se, se_tensors(batch, 20, 5, 3)[:2], []),
    }
