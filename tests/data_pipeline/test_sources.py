"""Names, guesses, sizes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from nvae_fast.data import DATASETS, check_size, open_images
from nvae_fast.data.transforms import Transform
from nvae_fast.errors import InputError


def test_the_table():
    assert {
        "demo",
        "mnist",
        "fashion_mnist",
        "omniglot",
        "stacked_mnist",
        "cifar10",
        "folder",
        "zip",
        "npy",
        "npz",
    } < set(DATASETS)
    # section 14 of the specification: size, padding, flip, binarisation
    rows = {name: (d.side, d.padding, d.flip, d.binarize) for name, d in DATASETS.items()}
    assert rows["mnist"] == rows["omniglot"] == rows["demo"] == (32, 2, False, True)
    assert rows["stacked_mnist"] == (32, 2, False, False) and rows["cifar10"] == (32, 0, True, False)
    assert rows["celeba_256"] == rows["ffhq"] == (256, 0, True, False) and rows["lsun_church_64"][0] == 64


def test_wrong_names(tmp_path, refused):
    refused("demo", "unknown dataset 'cifar'", "did you mean cifar10", dataset="cifar")
    refused("demo", "unknown split 'test'", split="test")
    refused("demo", "dataset cifar10 is not bundled: give --data", dataset="cifar10")
    refused(tmp_path / "nowhere", "nowhere does not exist: give --data", "--data demo")
    refused(tmp_path / "nowhere", "nowhere does not exist", dataset="mnist")
    refused("demo", "validation share is 1, expected a number between 0 and 1", valid_fraction=1)
    for size in ((0, 8), (8,), (8.0, 8)):
        refused("demo", f"image size {size}", image_size=size)
    (tmp_path / "a.xyz").write_text("")
    refused(tmp_path / "a.xyz", "a.xyz: expected a folder of images or a .zip", "--dataset")
    assert len(open_images(tmp_path, dataset="demo", split="valid")) == 1000


def test_unreadable_places(tmp_path, refused, monkeypatch):
    def forbid(*args, **options):
        raise PermissionError(13, "Permission denied", str(tmp_path / "x"))

    (tmp_path / "x").mkdir()
    monkeypatch.setattr("os.scandir", forbid)
    refused(tmp_path / "x", f"cannot read {tmp_path / 'x'}: Permission denied", dataset="folder")


def test_check_size():
    check_size(32, 64, 32)
    for size, stride, options, message in [
        ((30, 30), 8, {}, "image 30x30 must be divisible by 8: the nearest sizes are 24 and 32; use --image-size 32"),
        ((33, 33), 16, {}, "image 33x33 must be divisible by 16: the nearest sizes are 32 and 48; use --image-size 32"),
        ((24, 24), 16, {}, "the nearest sizes are 16 and 32; use --image-size 32"),
        (
            (5, 5),
            8,
            {},
            "image 5x5 must be divisible by 8: the nearest size is 8; use --image-size 8 or fewer --num-latent-scales",
        ),
        ((218, 178), 32, {}, "the nearest sizes are 192x160 and 224x192; use --image-size 224x192"),
        ((64, 70), 8, {}, "the nearest sizes are 64x64 and 64x72; use --image-size 64x72"),
        (
            (29, 29),
            8,
            {"padding": 2},
            "image 29x29 (with 2 pixels of padding on each side) must be divisible by 8: "
            "the nearest sizes are 24 and 32; use --image-size 28",
        ),
        ((4, 4), 3, {"padding": 2}, "the nearest size is 6; use --image-size 2"),
        ((8192, 64), 8, {}, "image 8192x64: expected at most 4096 pixels a side; use --image-size 256"),
        ((64, 64), 2**13, {}, "at most 12; use fewer --num-latent-scales or --num-preprocess-blocks"),
    ]:
        with pytest.raises(InputError) as caught:
            check_size(*size, stride, **options)
        assert str(caught.value).endswith(message), str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_resize_is_pillows(pixels, channels):
    image = pixels(50, 40, channels)
    out = Transform((16, 16))(image, "x")
    assert out.shape == (16, 16, channels)
    for c in range(channels):
        plane = Image.fromarray(np.ascontiguousarray(image[..., c])).resize((16, 20), Image.Resampling.BILINEAR)
        assert np.array_equal(out[..., c], np.asarray(plane)[2:18])
    whole = Transform((20, 16))(image, "x")
    for u, top in ((0.0, 0), (0.1999, 0), (0.2001, 1), (0.9999, 4)):  # each of the five places, the last one too
        crop = Transform((16, 16), random_crop=True)(image, "x", np.array([u, u]))
        assert np.array_equal(crop, whole[top : top + 16])


# image, what it is brought to, and where the middle of that begins: as torchvision rounds
MIDDLES = [
    ((8, 9), (8, 9), (0, 0)),
    ((8, 11), (8, 11), (0, 2)),
    ((13, 8), (13, 8), (2, 0)),
    ((15, 8), (15, 8), (4, 0)),
    ((15, 22), (8, 11), (0, 2)),
    ((22, 15), (11, 8), (2, 0)),
]


@pytest.mark.parametrize(("shape", "resized", "corner"), MIDDLES)
def test_sides_and_middles_are_whole_pixels(pixels, shape, resized, corner):
    image, (top, left) = pixels(*shape, 3), corner
    scaled = np.asarray(Image.fromarray(image).resize(resized[::-1], Image.Resampling.BILINEAR))
    assert np.array_equal(Transform((8, 8))(image, "x"), scaled[top : top + 8, left : left + 8])


def test_a_box_may_take_all_that_there_is(pixels):
    image = pixels(12, 9, 3)
    assert np.array_equal(Transform(box=(1, 2, 9, 12))(image, "x"), image[2:12, 1:9])
    for smaller in (image[:11], image[:, :8]):
        with pytest.raises(InputError, match="the crop box of this dataset needs at least 12x9"):
            Transform(box=(1, 2, 9, 12))(smaller, "x")


def test_importing_reads_nothing():
    code = (
        "import sys, nvae_fast.data; "
        "assert not {'lmdb', 'scipy', 'triton', 'torchvision'} & set(sys.modules), 'optional package imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
