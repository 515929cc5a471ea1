"""Numbers and pictures from trained models: evaluate, sample, reconstruct, convert; and every kind of data and likelihood."""

from __future__ import annotations

import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from nvae_fast import NVAE, PRESETS, readjust
from nvae_fast.checkpoint.native import load_model
from nvae_fast.data import open_images
from nvae_fast.data.base import MemorySource
from nvae_fast.evaluation import evaluate
from nvae_fast.readjust import readjust_bn
from nvae_fast.sampling import reconstruct_images, sample_images
from nvae_fast.training import Trainer
from nvae_fast.training.loop import Options


@pytest.fixture
def evaluation(cli, tmp_path):
    """evaluation(model, *flags): what `evaluate` writes."""

    def call(model, *flags):
        result = cli("evaluate", model, "--save", tmp_path / "numbers", *flags)
        assert result.code == 0, result
        return json.loads((tmp_path / "numbers" / "evaluation.json").read_text())

    return call


def test_evaluate(finished, evaluation, metrics):
    one, five = (evaluation(finished, "--num_iw_samples", k, "--batch_size", 6) for k in (1, 5))
    assert one == evaluation(finished, "--num-iw-samples", 1, "--batch_size", 6)
    assert one["nelbo"] != evaluation(finished, "--num_iw_samples", 1, "--seed", 2)["nelbo"]
    best = min(line["nelbo"] for line in metrics(finished) if line["event"] == "valid")
    for k, result in ((1, one), (5, five)):
        assert result["images"] == 6 and result["num_iw_samples"] == k and result["split"] == "valid"
        assert result["nelbo"] == pytest.approx(result["recon"] + result["kl"])
        assert result["kl"] == pytest.approx(sum(result["kl_groups"]), rel=1e-4)
        assert result["nelbo_bpd"] == pytest.approx(result["nelbo"] / (math.log(2) * 256))
        assert result["neg_log_p_bpd"] == pytest.approx(result["neg_log_p"] / (math.log(2) * 256))
        assert result["nelbo"] == pytest.approx(best, abs=2)  # the best checkpoint, other noise
        assert result["neg_log_p"] < result["nelbo"] + 2
    train = evaluation(finished, "--eval_on_train", "--num_iw_samples", 1, "--limit", 20)
    assert train["images"] == 20 and train["split"] == "train"


def test_a_validation_tells_which_groups_are_in_use(finished, metrics, cli, tmp_path):
    last = metrics(finished)[-1]
    assert last["event"] == "valid" and last["nelbo_se"] > 0 and sum(last["active_by_group"]) == last["active_channels"] > 0
    for i, (kl, active) in enumerate(zip(last["kl_groups"], last["active_by_group"], strict=True)):
        assert last[f"kl_group/{i:02d}"] == kl and last[f"active_group/{i:02d}"] == active
    assert cli("report", finished, "--out", tmp_path / "report.html").code == 0
    assert f", {last['active_by_group'][0]} active" in (tmp_path / "report.html").read_text()


def test_evaluation_and_pictures_leave_no_trace(finished):
    model = load_model(finished).train()
    x = torch.rand(4, 1, 16, 16)
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    evaluate(model, [x, x[:1]], num_iw_samples=2)
    sample_images(model, 3, temperature=0.5)
    reconstruct_images(model, x)
    with pytest.raises(ValueError, match="one per group"):
        sample_images(model, 3, temperature=[1.0])
    with pytest.raises(ValueError, match="images of shape"):
        evaluate(model, [x[:, :, :8]])
    assert model.training and all(m.training for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_importance_weights(finished):
    """K draws are K times one draw: log p is the mean of the weights, the ELBO the mean of the bounds."""
    model, x = load_model(finished), torch.rand(3, 1, 16, 16)
    result = evaluate(model, [x], num_iw_samples=3, seed=4)
    generator = torch.Generator().manual_seed(4)
    log_w, nelbo = [], []
    with torch.no_grad():
        for _ in range(3):
            noise = [torch.randn(3, *shape, generator=generator) for shape in model.config.latent_shapes]
            terms = model.loss(x, noise=noise)
            log_w.append(-terms["recon"] - terms["log_q"] + terms["log_p"])
            nelbo.append(terms["recon"] + terms["kl"])
    assert result.neg_log_p == pytest.approx((math.log(3) - torch.stack(log_w).logsumexp(0)).mean().item(), rel=1e-5)
    assert result.nelbo == pytest.approx(torch.stack(nelbo).mean().item(), rel=1e-5)


def test_sample(cli, finished, tmp_path):
    def sample(name, *flags):
        argv = (
            "sample",
            finished,
            "-n",
            5,
            "--columns",
            4,
            "--out",
            tmp_path / f"{name}.png",
            "--npz",
            tmp_path / f"{name}.npz",
        )
        assert cli(*argv, *flags).code == 0
        return np.load(tmp_path / f"{name}.npz")["images"]

    one = sample("one", "--temperature", "0.7")
    assert one.shape == (5, 16, 16, 1) and one.dtype == np.uint8 and one.min() < one.max()
    with Image.open(tmp_path / "one.png") as picture:  # 2 rows of 4, 64 pixels each, 2 between them
        assert picture.size == (4 * 66 + 2, 2 * 66 + 2)
    assert np.array_equal(one, sample("same", "--temp", "0.7,0.7"))
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "same.png").read_bytes()
    assert not np.array_equal(one, sample("seed", "--temperature", "0.7", "--seed", 2))
    assert not np.array_equal(one, sample("hot", "--temperature", "0.7,1.3"))
    cold = sample("cold", "--temperature", 0)
    assert np.array_equal(cold, cold[[0] * 5]) and not np.array_equal(one, one[[0] * 5])


def test_sample_as_the_public_code_does(cli, finished, tmp_path):
    argv = ("evaluate", "--checkpoint", finished, "--eval_mode", "sample", "--temp", 0.8, "--num_samples", 150)
    assert cli(*argv, "--save", tmp_path).code == 0
    shapes = {p.name: np.load(p)["samples"].shape for p in tmp_path.iterdir()}
    assert shapes == {"gpu_0_samples_0.npz": (100, 1, 16, 16), "gpu_0_samples_1.npz": (50, 1, 16, 16)}
    first, second = (np.load(tmp_path / f"gpu_0_samples_{i}.npz")["samples"] for i in (0, 1))
    assert not np.array_equal(first[:50], second)


def test_readjust_bn(finished):
    model = load_model(finished)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    readjust_bn(model, temperature=0.5, iterations=2, batch_size=4)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    decoder = {
        k for k, _ in model.named_buffers() if k.split(".")[0] in ("dec_tower", "post_process") and not k.endswith("_mask")
    }
    assert changed == decoder & before.keys() and changed and not model.training
    again = load_model(finished)
    readjust_bn(again, temperature=0.5, iterations=2, batch_size=4)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_sample_with_readjusted_bn(cli, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(readjust, "readjust_bn", functools.partial(readjust_bn, iterations=3))
    weights = {p: p.read_bytes() for p in finished.rglob("*.safetensors") if not p.name.startswith("bn-")}
    for name, flags in (("plain", ()), ("adjusted", ("--readjust_bn",)), ("again", ("--readjust-bn",))):
        assert cli("sample", finished, "-n", 4, "--out", tmp_path / f"{name}.png", *flags).code == 0
    plain, adjusted, again = ((tmp_path / f"{n}.png").read_bytes() for n in ("plain", "adjusted", "again"))
    assert plain != adjusted == again
    assert all(p.read_bytes() == content for p, content in weights.items())


def test_reconstruct(cli, finished, images, tmp_path):
    assert cli("reconstruct", finished, "--columns", 4, "--out", tmp_path / "a.png").code == 0
    assert cli("reconstruct", finished, "--columns", 4, "--data", images, "-n", 6, "--out", tmp_path / "b.png").code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as picture:  # 6 images: two rows of 4, each with its reconstructions
        assert picture.size == (4 * 66 + 2, 4 * 66 + 2)
        original, reconstruction = (np.asarray(picture)[top : top + 64, 2:66] for top in (2, 68))
    assert set(np.unique(original)) == {0, 255}  # binarised
    assert len(np.unique(reconstruction)) > 2  # probabilities


def test_there_and_back(train, cli, evaluation, tmp_path, waves, latest, metrics):
    np.save(tmp_path / "digits.npy", waves(40, 28, 28))
    flags = ("--data", tmp_path / "digits.npy", "--padding", 2, "--batch_size", 18)
    assert train(tmp_path / "run", *flags).code == 0
    file, back = tmp_path / "official.pt", tmp_path / "back"
    assert cli("convert", latest(tmp_path / "run"), file).code == 0
    assert cli("convert", file, back).code == 0
    ours, theirs = load_model(latest(tmp_path / "run")), NVAE.from_pretrained(back)
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    content = torch.load(file, weights_only=False)
    assert content["epoch"] == 3 and content["global_step"] == 6 and content["args"].dataset == "mnist"
    states = content["optimizer"]["state"]
    assert {s["step"] for s in states.values()} == {6} and len(states) == len(list(ours.parameters()))
    assert content["optimizer"]["param_groups"][0]["lr"] == metrics(tmp_path / "run")[-2]["lr"]
    data = ("--data", tmp_path / "digits.npy", "--num_iw_samples", 2)
    results = [evaluation(model, *data) for model in (latest(tmp_path / "run"), file, back)]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("shape", "flags", "likelihood"),
    [
        ((32, 32, 3), (), "dmol"),
        ((32, 32, 3), ("--num_x_bits", 5, "--num_nf", 1, "--compat", "nvlabs"), "dmol"),
        ((32, 48, 3), ("--num_mixture_dec", 1, "--flip"), "normal"),
        ((16, 24, 1), ("--no-binarize",), "dmol"),
        ((16, 16, 2), (), "dmol"),
        ((16, 16, 2), ("--binarize", "--use_se", "--no-res_dist"), "bernoulli"),
    ],
)
def test_kinds_of_data(train, evaluation, cli, tmp_path, waves, metrics, shape, flags, likelihood):
    height, width, channels = shape
    data, run = tmp_path / "data", tmp_path / "run"
    if channels == 3:
        data.mkdir()
        for i, image in enumerate(waves(20, *shape)):
            Image.fromarray(image).save(data / f"{i:02d}.png")
    else:
        data = tmp_path / "data.npy"
        np.save(data, waves(20, *shape))
    sizes = ("--batch_size", 9, "--epochs", 2, "--warmup_epochs", 0, "--images")
    result = train(run, "--data", data, *sizes, *flags)
    assert result.code == 0, result
    assert f"{likelihood} likelihood, 18 + 2 images of {channels}x{height}x{width} ('{data.name}')" in result.err
    last = metrics(run)[-1]
    dims = channels * height * width
    assert last["event"] == "valid" and last["nelbo_bpd"] == pytest.approx(last["nelbo"] / (math.log(2) * dims))
    assert {p.name for p in (run / "samples").iterdir()} == {
        f"epoch-000{epoch}-{what}.png" for epoch in (1, 2) for what in ("samples", "reconstructions")
    }
    result = evaluation(run, "--num_iw_samples", 2)
    assert result["images"] == 2 and result["nelbo_bpd"] == pytest.approx(result["nelbo"] / (math.log(2) * dims))
    assert cli("sample", run, "-n", 2, "--out", tmp_path / "s.png", "--npz", tmp_path / "s.npz").code == 0
    assert np.load(tmp_path / "s.npz")["images"].shape == (2, height, width, channels)
    assert cli("reconstruct", run, "--out", tmp_path / "r.png").code == 0


def test_a_size_given_for_the_training_holds_for_the_evaluation(train, evaluation, tmp_path, waves):
    np.save(tmp_path / "x.npy", waves(20, 20, 20))
    assert train(tmp_path / "run", "--data", tmp_path / "x.npy", "--image_size", 16).code == 0
    assert evaluation(tmp_path / "run", "--num_iw_samples", 1)["images"] == 2


def test_learning(tmp_path, metrics):
    """The bundled images at half their size, a small model, forty steps."""
    demo = PRESETS["demo"]
    config = dataclasses.replace(
        demo, image_size=(16, 16), padding=1, num_channels_enc=4, num_channels_dec=4, num_latent_per_group=4,
        num_latent_scales=2, num_groups_per_scale=1, num_preprocess_cells=1, num_postprocess_cells=1,
        training=dataclasses.replace(demo.training, epochs=2, batch_size=25, learning_rate=1e-2, weight_decay_norm=1e-2),
    )  # fmt: skip
    images = [open_images("demo", split=split).images[:500, ::2, ::2].numpy() for split in ("train", "valid")]
    train, valid = (MemorySource("demo", x) for x in images)
    result = Trainer(config, train, valid, Options(out=tmp_path, images=False, bar=False, log_every=1)).run()
    losses = [line["loss"] for line in metrics(tmp_path) if line["event"] == "train"]
    assert len(losses) == 40 and losses[0] == pytest.approx(196 * math.log(2), rel=0.1)  # knows nothing yet
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5]) and result.nelbo < 0.9 * losses[0]
