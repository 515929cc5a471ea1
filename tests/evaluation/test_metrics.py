"""Frechet and kernel distances against the fixture, closed forms and naive sums."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from nvae_fast import InputError
from nvae_fast.metrics import Moments, frechet_distance, kernel_distance, squared_mmd

CPU = torch.device("cpu")


def moments(features, *cuts):
    m = Moments(features.shape[1])
    for part in torch.tensor_split(features, cuts):
        m.add(part)
    return m


def test_the_fixture(fixtures):
    from safetensors.torch import load_file

    tensors = load_file(fixtures / "dists_and_schedules.safetensors")
    expected = json.loads((fixtures / "dists_and_schedules.json").read_text())["fid_example"]
    expected = expected if isinstance(expected, float) else next(v for v in expected.values() if isinstance(v, float))
    (_, *one), (_, *two) = (moments(tensors[f"fid/{name}"], 3, 7).result() for name in ("act1", "act2"))
    assert frechet_distance(*one, *two) == pytest.approx(expected, rel=1e-8)


def gaussian(d, rank, seed):
    a = np.random.default_rng(seed).normal(size=(d, rank))
    return np.random.default_rng(seed + 1).normal(size=d), a @ a.T / rank


def test_closed_forms():
    mean, cov = gaussian(6, 9, 0)
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(mean, cov, mean + 2, cov) == pytest.approx(24)
    assert frechet_distance(mean, cov, mean, 9 * cov) == pytest.approx(4 * np.trace(cov))  # (3 - 1)^2 tr S
    a, b = np.diag([1.0, 4.0]), np.diag([9.0, 0.0])
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(4 + 4)
    rotated, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(6, 6)))
    other, wide = gaussian(6, 6, 5)
    turned = frechet_distance(rotated @ mean, rotated @ cov @ rotated.T, rotated @ other, rotated @ wide @ rotated.T)
    assert turned == pytest.approx(frechet_distance(mean, cov, other, wide))


@pytest.mark.parametrize("ranks", [(40, 40), (3, 40), (3, 5), (0, 7), (0, 0)])
def test_singular_covariances(ranks):
    """Against the defining root (scipy, of slightly regular matrices); fewer images than features are the usual case."""
    scipy = pytest.importorskip("scipy.linalg")
    (m1, s1), (m2, s2) = (gaussian(20, r, i) if r else (np.ones(20) * i, np.zeros((20, 20))) for i, r in enumerate(ranks))
    value = frechet_distance(m1, s1, m2, s2)
    eye = 1e-9 * np.eye(20)
    root = scipy.sqrtm((s1 + eye) @ (s2 + eye)).real
    assert value == pytest.approx(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root), rel=1e-4, abs=1e-5)
    assert value == pytest.approx(frechet_distance(m2, s2, m1, s1), rel=1e-6, abs=1e-6)


def test_what_has_no_distance():
    mean, cov = gaussian(4, 4, 0)
    with pytest.raises(InputError, match="same features"):
        frechet_distance(mean, cov, mean[:3], cov[:3, :3])
    with pytest.raises(InputError, match="NaN or infinite"):
        frechet_distance(mean, cov, mean, cov * np.nan)
    with pytest.raises(InputError, match="at least 2"):
        moments(torch.zeros(1, 3)).result()


def test_moments_are_numpys_for_any_batches_and_any_offset():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    for cuts in ((), (1,), (7, 7, 30)):
        count, mean, cov = moments(x, *cuts).result()
        assert count == 50
        np.testing.assert_allclose(mean, x.mean(0).numpy(), rtol=1e-12)
        np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-8)


def naive(x, y):
    k = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    within = [np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j]) for s in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_distance_is_the_sum_it_stands_for():
    x, y = (np.random.default_rng(s).normal(size=(n, 3)) for s, n in ((0, 7), (1, 5)))
    assert squared_mmd(torch.tensor(x), torch.tensor(y)) == pytest.approx(naive(x, y))


def test_kernel_distance_is_unbiased_and_its_error_honest():
    """0 on average for one distribution; the standard error is the spread of independent repeats."""
    g = torch.Generator().manual_seed(1)
    results = [kernel_distance(*torch.randn(2, 400, 4, generator=g), device=CPU, subset_size=50) for _ in range(60)]
    assert {(r.subsets, r.subset_size) for r in results} == {(8, 50)}
    values = np.array([r.value for r in results])
    spread = values.std()
    assert abs(values.mean()) < 4 * spread / math.sqrt(60)
    assert np.mean([r.standard_error for r in results]) == pytest.approx(spread, rel=0.35)
    x, y = torch.randn(2, 400, 4, generator=g)
    assert kernel_distance(x, y + 1, device=CPU, subset_size=50).value > 10 * spread
    assert kernel_distance(x, y, device=CPU) == kernel_distance(x, y, device=CPU)
    one = kernel_distance(x, y, device=CPU)  # one subset of all
    assert one.value == pytest.approx(squared_mmd(x, y)) and math.isnan(one.standard_error) and one.subset_size == 400
    with pytest.raises(InputError, match="at least 2"):
        kernel_distance(x[:1], y, device=CPU)
