"""Features and references: what may be called FID, what is read from a file, and which images are compared."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nvae_fast import InputError, features
from nvae_fast.data.base import MemorySource
from nvae_fast.features import collect, make_features, pixels, randconv, reference, score
from nvae_fast.inception import Inception
from nvae_fast.metrics import frechet_distance
from nvae_fast.sampling import sample_images

CPU = torch.device("cpu")


def test_pixels_are_means_over_a_grid():
    x = torch.rand(2, 3, 16, 24)
    got = pixels(3, CPU).compute(x)
    assert got.shape == (2, 192)
    torch.testing.assert_close(got[1, 64 * 2 + 8 * 3 + 5], x[1, 2, 6:8, 15:18].mean())


def test_the_random_network_is_the_same_everywhere():
    one, two = randconv(1, CPU), randconv(1, CPU)
    x = torch.linspace(0, 1, 256).view(1, 1, 16, 16)
    assert torch.equal(one.compute(x), two.compute(x)) and one.compute(x).shape == (1, one.dim)
    assert one.compute(x)[0, :3].tolist() == pytest.approx([0.262649, 0.143110, 0.335578], rel=1e-4)
    assert (one.compute(x) != one.compute(x.flip(3))).any() and randconv(3, CPU).dim == one.dim


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with random weights of the Inception network under the names of the public file, with its extra entries."""
    torch.manual_seed(0)
    model = Inception()
    for m in model.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.weight.data *= 2  # else the signal fades over 90 layers
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path, model.eval()


def test_the_network_has_the_published_size():
    with torch.device("meta"):
        model = Inception()
    assert sum(p.numel() for p in model.parameters()) == 21_785_568  # InceptionV3 without its classifier
    assert model(torch.empty(2, 3, 40, 40, device="meta")).shape == (2, 2048)
    names = model.state_dict().keys()
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_5b.branch5x5_1.bn.bias", "Mixed_6e.branch7x7dbl_5.conv.weight",
            "Mixed_7a.branch7x7x3_4.bn.running_var", "Mixed_7c.branch3x3dbl_3b.bn.weight"} <= names  # fmt: skip
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes["Mixed_6c.branch7x7_2.conv.weight"] == (160, 160, 1, 7)
    assert shapes["Mixed_7b.branch_pool.conv.weight"] == (192, 1280, 1, 1)


def test_only_fids_own_weights_make_an_fid(weights, monkeypatch, tmp_path):
    path, model = weights
    got = make_features("inception", 3, CPU, path)
    assert got.label("fd").startswith("FD-inception-") and got.label("kd").startswith("KD-inception-") and not got.fid
    x = torch.rand(2, 3, 20, 20)
    with torch.no_grad():
        torch.testing.assert_close(got.compute(x), model(x))
    grey = make_features("inception", 1, CPU, path)
    torch.testing.assert_close(grey.compute(x[:1, :1]), got.compute(x[:1, :1].repeat(1, 3, 1, 1)))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(features, "FID_WEIGHTS", digest)
    fid = make_features("inception", 3, CPU, path)
    assert fid.fid and (fid.label("fd"), fid.label("kd")) == ("FID", "KID")
    for name in ("pixels", "randconv"):
        assert make_features(name, 3, CPU).label("fd") in ("FD-pixels8x8", "FD-randconv")
    state = torch.load(path)
    save_file(state, tmp_path / "same.safetensors")
    other = make_features("inception", 3, CPU, tmp_path / "same.safetensors")
    assert not other.fid  # the same numbers, but nobody can tell
    torch.testing.assert_close(other.compute(x), fid.compute(x))


class Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_weights_never_run_code(weights, tmp_path):
    path, _ = weights
    torch.save({"Conv2d_1a_3x3.conv.weight": Runs(tmp_path / "ran")}, tmp_path / "hostile.pth")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:  # as TorchScript programs are stored
        archive.writestr("script/data.pkl", b"")
        archive.writestr("script/code/__torch__.py", "class Inception(Module): ...")
    partial = {k: v for k, v in torch.load(path).items() if "Mixed_7c" not in k}
    torch.save(partial, tmp_path / "partial.pth")
    for name, words in (
        ("hostile.pth", "could run code"),
        ("script.pt", "TorchScript program, which is not run"),
        ("partial.pth", "it lacks"),
        ("missing.pth", "file of Inception weights"),
    ):
        with pytest.raises(InputError, match=words):
            make_features("inception", 3, CPU, tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="give --inception-weights FILE"):
        make_features("inception", 3, CPU)
    with pytest.raises(InputError, match="images of 2 channels"):
        make_features("inception", 2, CPU, path)
    with pytest.raises(InputError, match="unknown features 'pixel': did you mean pixels"):
        make_features("pixel", 3, CPU)


@pytest.fixture
def source(waves):
    return MemorySource("waves", waves[..., None])


def test_a_reference_is_kept_and_fits_its_images(source, tmp_path, waves):
    f = pixels(1, CPU)
    one = reference(source, f, tmp_path, CPU)
    (file,) = tmp_path.iterdir()
    x = torch.from_numpy(waves).float()[:, None] / 255
    expected = f.compute(x).double().numpy()
    assert one.count == 60 and torch.allclose(one.features, f.compute(x))
    np.testing.assert_allclose(one.mean, expected.mean(0), rtol=1e-6)
    np.testing.assert_allclose(one.cov, np.cov(expected, rowvar=False), rtol=1e-4, atol=1e-9)
    asked = []
    watched = f._replace(compute=lambda x: asked.append(len(x)) or f.compute(x))
    two = reference(source, watched, tmp_path, CPU)
    assert not asked and np.array_equal(one.cov, two.cov) and torch.equal(one.features, two.features)
    file.write_bytes(file.read_bytes()[:-5])
    assert np.allclose(reference(source, watched, tmp_path, CPU).cov, one.cov) and asked
    save_file(load_file(file), file, {"format": "another", "count": "60"})
    asked.clear()
    assert np.allclose(reference(source, watched, tmp_path, CPU).cov, one.cov) and asked
    changed = waves.copy()
    changed[-1, 0, 0] ^= 255
    reference(MemorySource("waves", changed[..., None]), f, tmp_path, CPU)
    few = reference(source, f, tmp_path, CPU, limit=20)
    assert len(list(tmp_path.iterdir())) == 3 and few.count == len(few.features) == 20
    rows = {tuple(r) for r in one.features.tolist()}
    assert all(tuple(r) in rows for r in few.features.tolist())
    assert few.features.tolist() != one.features[:20].tolist()  # sorted folders hold one kind of image after the other


def test_features_see_images_of_eight_bits(source):
    seen = []
    f = pixels(1, CPU)._replace(compute=lambda x: seen.append(x) or x.flatten(1)[:, :64])
    collect([torch.tensor([[0.1, 0.5], [0.7012, 1.3]]).view(1, 1, 2, 2).repeat(2, 1, 8, 8)], f, CPU, over_ranks=False)
    levels = seen[0][0, 0, :2, :2] * 255
    torch.testing.assert_close(levels, torch.tensor([[26.0, 128.0], [179.0, 255.0]]))


def test_the_temperature_asked_for_is_that_of_the_images(make, source, tmp_path):
    model, f = make(), pixels(1, CPU)
    against = reference(source, f, tmp_path, CPU)
    values = {}
    for t in (0.3, 1.0, [0.3, 1.0, 0.2]):
        found = score(model, against, f, ["fd", "kd"], num_samples=30, temperature=t, batch_size=8, seed=4)
        assert found.keys() == {"FD-pixels8x8", "KD-pixels8x8"}
        images = sample_images(model, 30, temperature=t, batch_size=8, seed=4)[..., 2:-2, 2:-2]
        expected = collect([images], f, CPU, over_ranks=False)
        d = found["FD-pixels8x8"]
        values[str(t)] = d.value
        assert d.value == pytest.approx(frechet_distance(against.mean, against.cov, expected.mean, expected.cov), rel=1e-5)
        assert (d.samples, d.reference_images, d.standard_error) == (30, 60, None)
    assert len(set(values.values())) == 3


def test_the_command(cli, refused, saved, weights, tmp_path):
    argv = ("evaluate", saved, "--num_samples", 20, "--batch_size", 6, "--temp", 0.6)
    result = cli(*argv, "--metrics", "fd,kd", "--features", "pixels")
    assert result.code == 0 and "FD-pixels8x8" in result.out and "at temperature 0.6 against 54 images (train)" in result.out
    first = json.loads((saved / "evaluation.json").read_text())
    assert first["distances"]["KD-pixels8x8"]["temperature"] == 0.6 and "nelbo" not in first and "FID" not in result.out
    result = cli(*argv, "--metrics", "nll,fd", "--num_iw_samples", 3, "--reference", "valid")
    assert result.code == 0 and "-log p(x) <=" in result.out and "+-" in result.out
    both = json.loads((saved / "evaluation.json").read_text())
    assert both["distances"].keys() == {"FD-pixels8x8", "KD-pixels8x8", "FD-randconv"} and both["images"] == 6
    assert both["distances"]["FD-pixels8x8"] == first["distances"]["FD-pixels8x8"]
    assert both["distances"]["FD-randconv"]["split"] == "valid"
    assert cli(*argv, "--metrics", "fd", "--readjust-bn", "--readjust_passes", 3).code == 0
    third = json.loads((saved / "evaluation.json").read_text())
    assert third["nelbo"] == both["nelbo"] and third["distances"]["FD-randconv"]["readjusted_bn"]
    assert third["distances"]["FD-randconv"]["value"] != both["distances"]["FD-randconv"]["value"]
    refused("unknown metric 'fid'")(*argv, "--metrics", "fid")
    refused("--inception-weights FILE")(*argv, "--eval_mode", "evaluate_fid")
    (tmp_path / "fid").mkdir()
    refused("file of Inception weights")(*argv, "--eval_mode", "evaluate_fid", "--fid_dir", tmp_path / "fid")
