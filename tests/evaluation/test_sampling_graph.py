"""Batches of samples from the folded model, and when they are recorded and replayed, on a stand-in for CUDA's graphs."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from nvae_fast import sampling
from nvae_fast.graph import WARM_UP
from nvae_fast.sampling import sample_batches

SETTINGS = dict(temperature=0.8, batch_size=2, seed=3)


def drawn(model, n=14, **options):
    return list(sample_batches(model, n, **SETTINGS, **options))


@pytest.fixture
def replays(fake_graphs, monkeypatch):
    """Sampling on the CPU is recorded; a list of the seeds that its generator had at each replay."""
    seeds, graphs = [], []

    class Graph(sampling.CallGraph):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            graphs.append(weakref.ref(self))

    def replay():
        graph = graphs[-1]()
        (generator,) = fake_graphs.generators[-1:]
        seeds.append(generator.initial_seed())
        for name, t in graph.run(*graph._kind).items():
            graph._found[name].copy_(t)

    fake_graphs.replay = replay
    monkeypatch.setattr(sampling, "CallGraph", Graph)
    monkeypatch.setattr(sampling, "REPLAYED", ("cpu",))
    return seeds


def test_replayed_batches_are_the_same_to_the_bit(make, monkeypatch, replays):
    replayed = drawn(make())
    assert len(replays) == 7 - WARM_UP and len(set(replays)) == len(replays)
    monkeypatch.setattr(sampling, "REPLAYED", ())
    assert all(torch.equal(a, b) for a, b in zip(replayed, drawn(make()), strict=True))
    assert all(
        not torch.equal(a, b) for a, b in zip(replayed, replayed[1:], strict=False)
    )  # no batch lies in the graph's memory


def test_a_shorter_last_batch_runs_as_it_is(make, replays):
    batches = drawn(make(), 13)
    assert [len(b) for b in batches] == [2] * 6 + [1] and len(replays) == 6 - WARM_UP


def test_a_changed_model_is_folded_and_recorded_anew(make, replays):
    model, other = make(), make(seed=1)
    batches = sample_batches(model, 2 * (2 * WARM_UP + 3), **SETTINGS)
    first = [next(batches) for _ in range(WARM_UP + 2)]
    assert len(replays) == 2
    model.load_state_dict(other.state_dict())
    rest = list(batches)
    assert len(replays) == 3
    expected = drawn(other, 2 * (2 * WARM_UP + 3))
    assert all(torch.equal(a, b) for a, b in zip(rest, expected[len(first) :], strict=True))
    assert not torch.equal(first[-1], expected[len(first) - 1])


def test_where_recording_fails_a_line_says_so(make, replays, fake_graphs, capsys):
    def refuse(model, *args):
        if fake_graphs.recording:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return torch.zeros(2, 1, 2, 2)

    model = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "show", lambda model, logits, generator, mean: refuse(model))
        assert len(drawn(model)) == 7
    said = "nvae-fast: sampling runs without a CUDA graph: RuntimeError: operation not permitted\n"
    assert capsys.readouterr().err == said and not replays


def test_the_mode_stays_and_nothing_is_kept(make, monkeypatch):
    model, alive, fold = make().train(), [], sampling.folded

    def watched(m):
        found = fold(m)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sampling, "folded", watched)
    gc.disable()  # so that a cycle would keep it
    try:
        drawn(model, 6)
        assert model.training and [ref() for ref in alive] == [None]
    finally:
        gc.enable()
