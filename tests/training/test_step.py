"""One step of training: what it clips, accumulates and averages, and that it never waits for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nvae_fast import layers
from nvae_fast.errors import InputError
from nvae_fast.optim import FusedAdamax

from .stepping import NUMBERS, OPTIONS, Run, batch


class Counting(TorchDispatchMode):
    """Which operations ran that read a number from the device."""

    READS = "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item"

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            self.found.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_read_from_the_device(options):
    run = Run(ema_decay=0.9, **options)
    with Counting() as first:
        run()
    with Counting() as later:
        run(2)
    assert not first.found and not later.found
    with Counting() as control:
        run()["total"].item()
    assert control.found


def test_clipping_is_torchs():
    runs = {name: Run(max_grad_norm=0.5 if name == "ours" else None) for name in ("ours", "torch")}
    run = runs["torch"]
    torch.manual_seed(1)
    terms = run.model.loss(batch(), kl_coeff=0.5, spectral_coeff=0.01, spectral=run.spectral)
    terms["total"].backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
    theirs = torch.optim.Adamax(
        run.model.parameters(), **{k: run.optimizer.defaults[k] for k in ("betas", "eps", "weight_decay")}, lr=0.01
    )
    theirs.step()
    found = runs["ours"]()
    assert norm > 0.5
    torch.testing.assert_close(found["grad_norm"], norm, rtol=1e-5, atol=0)
    for p, q in zip(runs["ours"].model.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    loose = Run(max_grad_norm=1e6)
    loose()
    assert loose.everything() == (lambda r: (r(), r.everything())[1])(Run())


def frozen_statistics(run):
    """Nothing in the model depends on which images share a batch: statistics fixed, no KL balance."""
    for m in run.model.modules():
        if isinstance(m, layers.BatchNormAct2d):
            m.eval()


@pytest.mark.parametrize("limit", [None, 0.5])
def test_accumulated_parts_are_the_whole_batch(limit):
    x = batch(12)
    noise = [torch.randn(12, *shape) for shape in Run().model.config.latent_shapes]
    results = []
    for parts in (1, 2, 3):
        run = Run(accumulate=parts, max_grad_norm=limit)
        frozen_statistics(run)
        given = iter([[n.chunk(parts)[i] for n in noise] for i in range(parts)])
        run.step.loss = lambda part, run=run, given=given, **options: run.model.loss(part, noise=next(given), **options)
        terms = run.step(x, rate=0.01, kl_coeff=1.0, norm_coeff=0.01)
        results.append((terms, run.everything(), [s["exp_avg"].clone() for s in run.optimizer.state.values()]))
    norm = float(results[0][0]["grad_norm"])
    assert norm > 0.5
    for terms, _, averages in results[1:]:
        for name in ("total", "recon", "kl", "kl_all", "spectral", "bn", "grad_norm"):
            torch.testing.assert_close(terms[name], results[0][0][name], rtol=1e-4, atol=1e-5)
        for a, b in zip(averages, results[0][2], strict=True):  # a tenth of the gradient
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-6 * (limit or norm))
    vectors = [{k: v for k, v in r[1].items() if k[:2] in ("u/", "v/")} for r in results]
    assert vectors[0] == vectors[1] == vectors[2]  # moved once


@pytest.mark.parametrize("kl_coeff", [0.3, 1.0])
def test_schedules_may_be_tensors(kl_coeff):
    """What a recorded step passes gives the bits that numbers give."""
    runs = Run(max_grad_norm=5.0), Run(max_grad_norm=5.0)
    rate = torch.tensor(0.0123, dtype=torch.float64)
    for _ in range(3):
        a = runs[0](rate=0.0123, kl_coeff=kl_coeff, norm_coeff=0.03)
        b = runs[1](rate=rate, kl_coeff=torch.tensor(kl_coeff), norm_coeff=torch.tensor(0.03))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert runs[0].everything() == runs[1].everything()


def test_a_graph_needs_a_gpu(capsys):
    run, plain = Run(graph=True), Run()
    assert capsys.readouterr().err == "nvae-fast: the step runs without a CUDA graph: the model is on the cpu, expected cuda\n"
    run(2)
    plain(2)
    assert run.everything() == plain.everything() and not capsys.readouterr().err


def test_average_of_the_weights():
    run, plain = Run(ema_decay=0.75), Run()
    expected = [p.detach().clone() for p in run.model.parameters()]
    for i in range(4):
        run(seed=i)
        plain(seed=i)
        for mean, p in zip(expected, run.model.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.25)
    torch.testing.assert_close(list(run.optimizer.ema_parameters()), expected, rtol=1e-6, atol=1e-7)
    weights = [p.detach().clone() for p in run.model.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(weights, plain.model.parameters(), strict=True))
    with pytest.raises(KeyError), run.optimizer.swapped_ema():
        torch.testing.assert_close([p.detach() for p in run.model.parameters()], expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(run.model.stem.weight, weights[1])
        raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(weights, run.model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="averages no parameters"), plain.optimizer.swapped_ema():
        pass


@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"accumulate": 0}, {"max_grad_norm": 0.0}], ids=str)
def test_bad_options(options):
    (name, value), *_ = options.items()
    with pytest.raises(InputError, match=f"^{name} '?{value}'?: expected"):
        Run(**options)
    with pytest.raises(InputError, match="^accumulate 3: a batch of 8 has no 3 equal parts"):
        Run(accumulate=3)()


def test_parameters_that_cannot_be_packed():
    run = Run()
    run.model.double()
    with pytest.raises(RuntimeError, match=r"decide needs plain float32 parameters .* torch.float64 on cpu; call model.float"):
        run.step(batch().double(), **NUMBERS)
    with pytest.raises(RuntimeError, match="ema_decay needs plain float32 parameters"):
        p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
        p.grad = torch.zeros_like(p)
        FusedAdamax([p], ema_decay=0.5).step()


def test_moved_and_copied_models_go_on():
    run, plain = Run(), Run()
    run(1)
    plain(1)
    run.model.to(memory_format=torch.contiguous_format)
    other = copy.deepcopy(run)
    for each in (run, plain, other):
        each(2)
    for p, q, r in zip(run.model.parameters(), plain.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(p, r, rtol=1e-4, atol=1e-5)
