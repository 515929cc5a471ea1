"""The estimate of a run's memory against tensors counted in real steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import CONFIG

from nvae_fast import NVAE, InputError
from nvae_fast.cli import main
from nvae_fast.cli.estimate import size
from nvae_fast.estimate import Tracer
from nvae_fast.kernels import _impl, use_impl
from nvae_fast.memory import PeakMemory
from nvae_fast.optim import make_optimizer
from nvae_fast.regularization import SpectralState
from nvae_fast.training.step import TrainingStep

SIZES = {
    "small": dataclasses.replace(CONFIG, image_size=(16, 16)),
    "wide": dataclasses.replace(CONFIG, image_size=(16, 32), num_channels_enc=16, num_channels_dec=16),
    "flows, no SE": dataclasses.replace(CONFIG, image_size=(32, 32), num_nf=1, use_se=False, num_preprocess_cells=2),
}
NATIVE = _impl.load_native()[0] is not None


def counted(config, memory: str, batch: int) -> int:
    """Bytes of all tensors at the worst moment of the second step."""
    with use_impl("cpu" if NATIVE else "reference"), PeakMemory() as m:
        model = NVAE(config).to(memory_format=torch.channels_last).train().set_memory(memory)
        step = TrainingStep(model, make_optimizer(model), SpectralState())
        x = torch.rand(batch, config.channels, *config.image_size).contiguous(memory_format=torch.channels_last)
        for _ in range(2):
            m.peak_bytes = m.live_bytes
            step(x, rate=1e-3, kl_coeff=0.5, norm_coeff=1e-2)
        return m.peak_bytes - x.nbytes


@pytest.mark.parametrize("memory", ("fast", "balanced", "low"))
@pytest.mark.parametrize("name", SIZES)
def test_it_is_within_a_tenth_of_real_steps(name, memory):
    tracer = Tracer(SIZES[name])
    found = tracer.footprint(memory, 6)
    for batch in (6, 10):
        assert found.at(batch) == pytest.approx(counted(SIZES[name], memory, batch), rel=0.1)
    parts = found.weights + found.gradients + found.optimizer + found.kept
    assert 0 < found.kept and parts <= found.peak
    assert found.largest_batch(found.at(7) + 1) == 7 and found.largest_batch(found.weights) == 0


@pytest.mark.skipif(not NATIVE, reason="the references keep the same in every memory mode")
def test_low_keeps_less():
    tracer = Tracer(SIZES["wide"])
    assert tracer.footprint("low", 4).kept < 0.7 * tracer.footprint("balanced", 4).kept


def test_the_command_prints_every_mode(capsys):
    assert main(["estimate", "--preset", "demo", "--num_channels_enc", "4", "--num_channels_dec", "4", "--batch-size", "4",
                 "--budget", "1 GiB", "--image-size", "44"]) == 0  # fmt: skip
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.split()[0] in ("--memory", "plain")]
    assert [row[1] for row in rows] == ["fast", "balanced", "low", "PyTorch"] and all(int(row[-1]) > 4 for row in rows)
    assert "largest batch in 1.00 GiB" in said and "images of 1x48x48, batch 4" in said  # with 2 pixels of padding
    if NATIVE:  # the plain model keeps most
        assert max(range(4), key=lambda i: float(rows[i][2])) == 3 and len({row[3] for row in rows}) == 1


def test_sizes_are_read_as_people_write_them():
    assert [size(s) for s in ("24GB", "1.5 GiB", "800M", "512")] == [24 * 2**30, 3 * 2**29, 800 * 2**20, 512]
    for text in ("lots", "0", "9" * 400):
        with pytest.raises(InputError, match=f"--budget={text[:40]}: expected a size such as 24GB"):
            size(text)
