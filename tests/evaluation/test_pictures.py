"""sample, reconstruct, interpolate, traverse, encode, decode: what they write, and what they say to bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from nvae_fast import InputError, RunError, TrainConfig
from nvae_fast.checkpoint.native import load_model
from nvae_fast.data import open_images
from nvae_fast.latents import interpolate, mix, traverse
from nvae_fast.sampling import check_finite, decode, encode, reconstruct_images, sample_batches, sample_images

DMOL = {"training": TrainConfig(), "num_mixture_dec": 2}


@pytest.fixture(params=[{}, DMOL, {**DMOL, "num_nf": 1}], ids=["bernoulli", "dmol", "flows"])
def model(make, request):
    return make(**request.param)


@pytest.fixture(scope="module")
def x():
    return torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(5)).round()


def test_decoding_what_was_encoded_is_the_reconstruction(model, x):
    for kind in ({}, {"mean": True}):
        z = encode(model, x, seed=3, **kind)
        assert [t.shape[1:] for t in z] == model.config.latent_shapes
        expected = reconstruct_images(model, x, seed=3, mean_latents=bool(kind))
        assert torch.equal(decode(model, z, seed=3), expected)
        other = encode(model, x, seed=4, **kind)
        assert all(torch.equal(a, b) for a, b in zip(z, other, strict=True)) == bool(kind)
    z[1] = z[1] + 1
    assert not torch.equal(decode(model, z, seed=3), expected)


def test_samples_do_not_depend_on_who_draws_them(model):
    whole = sample_images(model, 10, batch_size=4, temperature=0.8, seed=2)
    assert whole.shape == (10, 1, 16, 16)
    shares = [list(sample_batches(model, 10, batch_size=4, temperature=0.8, seed=2, part=(r, 2))) for r in (0, 1)]
    assert torch.equal(torch.cat([shares[0][0], shares[1][0], shares[0][1]]), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 10
    by_group = sample_images(model, 10, batch_size=4, temperature=[0.8] * 3, seed=2)
    assert torch.equal(by_group, whole)
    assert not torch.equal(sample_images(model, 10, batch_size=4, temperature=[0.8, 0.8, 0.1], seed=2), whole)
    frozen = sample_images(model, 3, temperature=0, mean=True)
    assert torch.allclose(frozen, frozen[:1], atol=1e-5)


def test_images_that_are_not_finite_are_told(make, saved, cli, tmp_path):
    """By the commands and by distances; a training run that draws pictures goes on."""
    model = make(training=load_model(saved).config.training)
    with torch.no_grad():
        model.image_conditional[1].bias.fill_(torch.nan)
    assert sample_images(model, 2).isnan().all()
    with pytest.raises(RunError, match="2 of 2 images hold NaN"):
        check_finite(sample_images(model, 2))
    model.save_pretrained(saved)
    for argv in (
        ("sample", saved, "-n", 2, "--out", tmp_path / "x.png"),
        ("reconstruct", saved, "--out", tmp_path / "x.png"),
        ("evaluate", saved, "--metrics", "fd", "--num_samples", 4, "--save", tmp_path / "out"),
        ("evaluate", saved, "--eval_mode", "sample", "--num_samples", 4, "--save", tmp_path / "out"),
    ):
        result = cli(*argv)
        assert result.code == 1 and "images hold NaN or infinite pixels" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "x.png").exists() and not list(tmp_path.glob("out/[eg]*"))


def test_mixing():
    a, b = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    a = a / a.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    b = b / b.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for path in ("linear", "spherical"):
        assert torch.equal(mix(a, b, 0.0, path), a) and torch.equal(mix(a, b, 1.0, path), b)
        torch.testing.assert_close(mix(a, b, 0.25, path), mix(b, a, 0.75, path))
        torch.testing.assert_close(mix(a, a, 0.3, path), a)
        torch.testing.assert_close(mix(a, torch.zeros_like(a), 0.5, path), a * (0.5 if path == "linear" else 0.5**0.5))
    middle = mix(a, b, 0.5, "spherical").flatten(1)
    torch.testing.assert_close(middle.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(middle, torch.nn.functional.normalize((a + b).flatten(1), dim=1))
    quarter = mix(a, b, 0.25, "spherical").flatten(1)  # equal angles at equal steps
    torch.testing.assert_close((quarter * middle).sum(1), (quarter * a.flatten(1)).sum(1))
    assert (mix(a, b, 0.5).flatten(1).norm(dim=1) < 0.9).all()
    with pytest.raises(InputError, match="path 'around'"):
        mix(a, b, 0.5, "around")


def test_interpolation_ends_at_the_images(make, x):
    model = make()
    rows = interpolate(model, x[:2], x[2:4], 4, seed=6)
    assert rows.shape == (2, 4, 1, 16, 16)
    assert torch.equal(rows[:, 0], reconstruct_images(model, x[:2], seed=6))
    assert torch.equal(rows[:, -1], reconstruct_images(model, x[2:4], seed=6))
    one = interpolate(model, x[:2], x[2:4], 4, groups=[2], seed=6)
    assert torch.equal(one[:, 0], rows[:, 0]) and not torch.equal(one[:, -1], rows[:, -1])
    z = [*encode(model, x[:2], seed=6)[:2], encode(model, x[2:4], seed=6)[2]]
    assert torch.equal(one[:, -1], decode(model, z, seed=6))
    for bad in ({"steps": 1}, {"steps": 3, "groups": [3]}):
        with pytest.raises(InputError, match="expected 2 or more|groups 0 "):
            interpolate(model, x[:2], x[2:4], **bad)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_traversal_moves_one_group_only(make, x, group, monkeypatch):
    model = make()
    z = encode(model, x[:2], seed=1)
    decoded = []
    plain = model.decode
    monkeypatch.setattr(model, "decode", lambda latents: decoded.append(latents) or plain(latents))
    drawn = traverse(model, z, group, 4, seed=2)
    assert torch.equal(drawn[:, 0], decode(model, z, seed=2)) and not torch.equal(drawn[:, 0], drawn[:, 1])
    moved = traverse(model, z, group, 5, reach=2.0, channel=1, seed=2)
    assert torch.equal(moved[:, 2], drawn[:, 0])  # s = 0
    for latents in decoded:
        assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(latents, z, strict=True)) if i != group)
    for latents in decoded[-5:]:
        assert torch.equal(latents[group][:, [0, 2]], z[group][:, [0, 2]])
    steps = [latents[group][:, 1] - z[group][:, 1] for latents in decoded[-5:]]
    torch.testing.assert_close(steps[4], -steps[0])
    torch.testing.assert_close(steps[4], 2 * steps[3])
    assert (steps[4] > 0).all()
    with torch.no_grad():  # far from the mean, z is on the scale of the prior's sigma
        cold = traverse(model, z, group, 2, temperature=0.0, seed=3)
        assert torch.equal(cold, traverse(model, z, group, 2, temperature=0.0, seed=4))
    if group == 0:
        assert torch.allclose(steps[4], torch.full_like(steps[4], 2 * 1.01))  # Normal(0, 1.01)
    for bad in ({"group": 3}, {"group": 0, "channel": 3}, {"group": 0, "steps": 0}):
        with pytest.raises(InputError, match="groups 0|channels 0 to 2|1 or more"):
            traverse(model, z, **{"steps": 2, **bad})


def test_the_commands(cli, saved, tmp_path):
    def png(name):
        with Image.open(tmp_path / name) as picture:
            return picture.size, picture.tobytes()

    npz = tmp_path / "s.npz"
    assert cli("sample", saved, "-n", 4, "--temperature", "0.7,0.6,0.5", "--out", tmp_path / "s.png", "--npz", npz).code == 0
    assert np.load(npz)["images"].dtype == np.uint8 and np.load(npz)["images"].shape == (4, 16, 16, 1)
    assert len(open_images(npz, split="train")) == 3  # --data reads it back
    for path, groups in (("linear", ()), ("spherical", ("--groups", "0,1"))):
        argv = ("interpolate", saved, "-n", 4, "--steps", 3, "--path", path, *groups)
        assert cli(*argv, "--out", tmp_path / f"{path}.png").code == 0
    assert png("linear.png")[0] == (3 * 66 + 2, 2 * 66 + 2) and png("linear.png") != png("spherical.png")
    assert cli("traverse", saved, "-n", 2, "--steps", 3, "--group", 1, "--out", tmp_path / "t.png").code == 0
    assert png("t.png")[0] == (3 * 66 + 2, 2 * 66 + 2)
    latents = tmp_path / "z.safetensors"
    for seed in ((), ("--seed", 7)):
        result = cli("encode", saved, "-n", 6, "--out", latents, *seed)
        assert result.code == 0 and "latents of 6 images, 432 numbers each in 3 groups" in result.out
        assert cli("decode", saved, latents, "--out", tmp_path / "d.png", "--npz", tmp_path / "d.npz").code == 0
        assert cli("reconstruct", saved, "--out", tmp_path / "r.png", "--npz", tmp_path / "r.npz", *seed).code == 0
        decoded, reconstructed = (np.load(tmp_path / f"{n}.npz")["images"] for n in ("d", "r"))
        assert len(decoded) == 6 and np.array_equal(decoded, reconstructed)
    assert cli("reconstruct", saved, "--indices", "3,1", "--out", tmp_path / "i.png", "--npz", tmp_path / "i.npz").code == 0
    assert len(np.load(tmp_path / "i.npz")["images"]) == 2


def test_decode_draws_pixels_as_the_file_says(cli, make, saved, tmp_path):
    training = TrainConfig(data=str(saved.parent / "waves.npy"), dataset="npy")
    make(training=training, num_mixture_dec=2).save_pretrained(saved)
    images = {}
    for name, argv in (
        ("latents", ("encode", saved, "-n", 6, "--seed", 7)),
        ("asked", ("reconstruct", saved, "--seed", 7)),
        ("decoded", ("decode", saved, tmp_path / "latents")),
        ("other", ("decode", saved, tmp_path / "latents", "--seed", 8)),
        ("mean", ("decode", saved, tmp_path / "latents", "--seed", 8, "--mean-pixels")),
        ("same", ("decode", saved, tmp_path / "latents", "--mean-pixels")),
    ):
        npz = tmp_path / f"{name}.npz"
        out = ("--out", tmp_path / name) if name == "latents" else ("--out", tmp_path / "x.png", "--npz", npz)
        assert cli(*argv, *out).code == 0
        images[name] = np.load(npz)["images"] if name != "latents" else None
    assert np.array_equal(images["decoded"], images["asked"]) and not np.array_equal(images["decoded"], images["other"])
    assert np.array_equal(images["mean"], images["same"]) and not np.array_equal(images["mean"], images["other"])


def test_bad_input_is_one_line(cli, refused, saved, tmp_path):
    out = ("--out", tmp_path / "x.png")
    latents = tmp_path / "z.safetensors"
    assert cli("encode", saved, "-n", 2, "--out", latents).code == 0
    stored = load_file(latents)
    for name, content, words in (
        ("missing", None, "cannot read latents"),
        ("text", b"hello", "cannot read latents"),
        ("foreign", ({"latent/000": torch.zeros(2)}, {}), "holds no latents"),
        ("shape", ({k: v[:, :2] for k, v in stored.items()}, {"seed": "1"}), "this model's are"),
        ("nan", ({k: v * torch.nan for k, v in stored.items()}, {"seed": "1"}), "NaN or infinite"),
        ("seedless", (stored, {}), "does not say which seed"),
    ):
        file = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            file.write_bytes(content)
        elif content is not None:
            tensors, about = content
            about = {} if name == "foreign" else {"format": "nvae_fast latents 1", **about}
            save_file({k: v.contiguous() for k, v in tensors.items()}, file, about)
        refused(words)("decode", saved, file, *out)
    refused("one per group (3 of them)")("sample", saved, "--temperature", "0.7,0.8", *out)
    refused("--indices 6", "images 0 to 5")("reconstruct", saved, "--indices", "0,6", *out)
    refused("'0;6' is no list")("reconstruct", saved, "--indices", "0;6", *out)
    refused("pairs")("interpolate", saved, "-n", 1, *out)
    refused("groups 0 (the smallest latents) to 2")("traverse", saved, "--group", 3, *out)
    refused("one number")("traverse", saved, "--temperature", "1,2,3", *out)
    assert not (tmp_path / "x.png").exists()
