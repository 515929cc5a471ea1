"""LMDBs made by `nvae-fast prepare`: in the reference's layout, bit-exact, and never half."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nvae_fast.cli import main
from nvae_fast.data import lmdb_store, open_images
from nvae_fast.data import prepare as prepare_module
from nvae_fast.data.prepare import prepare
from nvae_fast.errors import InputError

lmdb = pytest.importorskip("lmdb")


def values(path: Path) -> list[bytes]:
    """What lies under 0, 1, ... (nothing else may), read without the package."""
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as transaction:
        count = env.stat()["entries"]
        return [transaction.get(str(i).encode()) for i in range(count)]


@pytest.mark.parametrize("kind", ["npz", "folder", "zip"])
@pytest.mark.parametrize("shape", [(8, 6, 3), (8, 8, 1)])
def test_own_images_of_any_shape(tmp_path, pixels, save, kind, shape, capsys):
    images = pixels(30, *shape)
    source = tmp_path / f"source.{kind}"
    if kind == "npz":
        np.savez(source, images=images)
    else:
        source = tmp_path / "source"
        source.mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image.squeeze()).save(source / f"{i:02}.png")
        if kind == "zip":
            source = tmp_path / "source.zip"
            with zipfile.ZipFile(source, "w") as archive:
                for file in sorted((tmp_path / "source").iterdir()):
                    archive.write(file, file.name)
    out = tmp_path / "out"
    assert main(["prepare", str(source), str(out), "--seed", "5", "--no-bar"]) == 0
    assert "27 training and 3 validation images" in capsys.readouterr().out
    for split, store in (("train", "train.lmdb"), ("valid", "validation.lmdb")):
        plain, stored = open_images(source, split=split, seed=5), values(out / store)
        ours = open_images(out, split=split)
        assert len(plain) == len(ours) == len(stored) and ours.images is None
        assert stored == [plain[i].tobytes() for i in range(len(plain))]
        assert all(np.array_equal(plain[i], ours[i]) for i in range(len(plain)))
    about = json.loads((out / "dataset.json").read_text())
    assert (about["dataset"], about["train"], about["valid"], about["height"]) == ("lmdb", 27, 3, 8)
    assert sorted(p.name for p in out.iterdir()) == ["dataset.json", "train.lmdb", "validation.lmdb"]
    assert open_images(out, image_size=(4, 4))[0].shape == (4, 4, shape[2])


def test_ten_thousand_images_in_the_references_layout(tmp_path, pixels):
    images = pixels(10_000, 32, 32, 3)
    for store, part in (("train.lmdb", images), ("validation.lmdb", images[:7])):  # as the reference writes them
        with lmdb.open(str(tmp_path / store), map_size=2**27, sync=False) as env, env.begin(write=True) as transaction:
            for i, image in enumerate(part):
                transaction.put(str(i).encode("ascii"), image.tobytes())
    source = open_images(tmp_path, dataset="imagenet_32")
    assert len(source) == 10_000 and len(open_images(tmp_path, dataset="imagenet_32", split="valid")) == 7
    for start in range(0, 10_000, 1000):
        index = np.arange(start, start + 1000)
        assert np.array_equal(source.batch(index).images, images[index])


@pytest.mark.parametrize("name", ["celeba_256", "ffhq", "imagenet_32"])
def test_raw_layouts(tmp_path, save, name):
    side = 32 if name == "imagenet_32" else 256
    big = save(tmp_path / "s" / "train" / "1.png", 2 * side, 2 * side + 9, 3)
    save(tmp_path / "s" / "valid" / "1.png", side, side)
    assert prepare(tmp_path / "s", tmp_path / "o", dataset=name) == {"train": 1, "valid": 1}
    small = Image.fromarray(big).resize((side + 9 // 2, side), Image.Resampling.BILINEAR)
    expected = np.asarray(small)[:, 2 : 2 + side]
    assert values(tmp_path / "o" / "train.lmdb") == [expected.tobytes()]
    source = open_images(tmp_path / "o")  # the description says which data set it is
    assert source.name == name and np.array_equal(source[0], expected)


@pytest.mark.parametrize(("name", "store"), [("celeba_64", "train.lmdb"), ("lsun_church_64", "church_outdoor_train_lmdb")])
def test_encoded_layouts_keep_the_files(tmp_path, save, name, store):
    for i in range(3):
        save(tmp_path / "s" / "train" / f"{i}.jpg", 218, 178, 3, seed=i)
    save(tmp_path / "s" / "valid" / "1.png", 218, 178, 3)
    (tmp_path / "s" / "train" / "1.jpg").write_bytes(b"no image")
    files = [(tmp_path / "s" / "train" / f"{i}.jpg").read_bytes() for i in (0, 2)]
    with pytest.raises(InputError, match="1.jpg is no image of a known kind"):
        prepare(tmp_path / "s", tmp_path / "o", dataset=name, max_corrupt=0)
    assert not list(tmp_path.glob("o*"))
    assert prepare(tmp_path / "s", tmp_path / "o", dataset=name)["train"] == 2
    assert values(tmp_path / "o" / store) == files
    for spec, options in ((tmp_path / "o", {}), (tmp_path / "o", {"dataset": name})):
        source = open_images(spec, **options)
        assert np.array_equal(source[1], open_images(tmp_path / "s", dataset=name, keep_small=False)[2])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError, InputError])
def test_an_interrupted_prepare_leaves_nothing_that_looks_whole(tmp_path, pixels, monkeypatch, failure):
    np.savez(tmp_path / "s.npz", images=pixels(40, 4, 4, 3))
    monkeypatch.setattr(prepare_module, "_CHUNK", 4)
    real, calls = prepare_module.parallel, []

    def failing(work, items, chunk):
        calls.append(items)
        if len(calls) == fails_at:
            assert (tmp_path / "o.partial").exists() and not (tmp_path / "o").exists()
            raise failure("stop")
        return real(work, items, chunk)

    monkeypatch.setattr(prepare_module, "parallel", failing)
    for call in (2, 10):  # within the first and the second database
        calls.clear()
        fails_at = call
        with pytest.raises((KeyboardInterrupt, InputError)):
            prepare(tmp_path / "s.npz", tmp_path / "o")
        assert not list(tmp_path.glob("o*"))
    fails_at = 0
    (tmp_path / "o.partial").mkdir()  # left by a process that was killed
    (tmp_path / "o.partial" / "train.lmdb").write_text("half")
    (tmp_path / "o").mkdir()
    assert prepare(tmp_path / "s.npz", tmp_path / "o") == {"train": 36, "valid": 4}
    assert not (tmp_path / "o.partial").exists()


def test_the_map_grows(tmp_path, monkeypatch):
    real = lmdb.open
    monkeypatch.setattr(lmdb, "open", lambda *a, **k: real(*a, **(k | {"map_size": 2**16})))
    chunks = [[bytes([i]) * 5000 for i in range(20)] for _ in range(5)]
    assert lmdb_store.write_lmdb(tmp_path / "a", chunks) == 100
    assert values(tmp_path / "a") == [value for chunk in chunks for value in chunk]


def test_wrong_use(tmp_path, pixels, save):
    np.savez(tmp_path / "s.npz", images=pixels(20, 4, 4, 3))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    source, out = tmp_path / "s.npz", tmp_path / "o"
    for arguments, options, message in [
        ((source, tmp_path / "there"), {}, "there exists: choose a new folder"),
        ((source, out), {"dataset": "cifar10"}, "unknown dataset with LMDBs 'cifar10'"),
        ((source, out), {"dataset": "ffhq", "image_size": (4, 4)}, "leave out --dataset or --image-size"),
        ((source, out), {"dataset": "celeba_64"}, "needs at least 188x163|has no image files"),
        ((source, out), {"dataset": "lsun_church_64"}, "has no image files"),
        ((source, out), {"read": "nothing"}, "unknown dataset 'nothing'"),
        ((tmp_path / "none", out), {}, "does not exist"),
    ]:
        with pytest.raises(InputError, match=message):
            prepare(*arguments, **options)
        assert not list(tmp_path.glob("o*"))
    np.savez(tmp_path / "grey.npz", images=pixels(20, 4, 4))
    with pytest.raises(InputError, match="has images of 32x32x1, imagenet_32 takes 32x32x3"):
        prepare(tmp_path / "grey.npz", out, dataset="imagenet_32")


def test_the_description_is_checked(tmp_path, pixels, refused):
    np.savez(tmp_path / "s.npz", images=pixels(20, 4, 4, 3))
    prepare(tmp_path / "s.npz", tmp_path / "o")
    about = tmp_path / "o" / "dataset.json"
    for text, message in [
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "names no dataset"),
        ('{"dataset": "lmdb", "height": -1}', "names no height"),
        ('{"dataset": "x"}', "unknown dataset in"),
        ('{"dataset": "lmdb", "height": 5, "width": 4, "channels": 3}', "has 48 bytes, expected 5x4x3"),
    ]:
        about.write_text(text)
        with pytest.raises(InputError, match=message):
            open_images(tmp_path / "o")[0]


def test_a_cut_off_database_is_refused(tmp_path, pixels, refused):
    np.savez(tmp_path / "s.npz", images=pixels(2000, 8, 8, 3))
    prepare(tmp_path / "s.npz", tmp_path / "o")
    path = tmp_path / "o" / "train.lmdb" / "data.mdb"
    content = path.read_bytes()
    for keep in (len(content) // 2, 3 * 4096, 100, 0):  # a page beyond the end would kill the process
        path.write_bytes(content[:keep])
        lmdb_store._environment.cache_clear()
        refused(tmp_path / "o", "train.lmdb is ", "cut off" if keep > 4096 else "")
