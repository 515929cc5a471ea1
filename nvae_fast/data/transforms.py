"""From a decoded image to the size the model wants."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..errors import InputError


@dataclass(frozen=True)
class Transform:
    """uint8 [h,w,C] -> uint8 [H,W,C]: cut `box`, shrink or enlarge until `size` is just covered, crop to `size`.

    Args:
        size: (H, W) in pixels; None keeps the image as it is. Of the two scale factors the larger one is taken (the
            shorter side becomes D for a square size D), PIL bilinear with antialiasing.
        box: (left, top, right, bottom) in pixels, cut out before anything else.
        random_crop: the crop goes where the image's two random numbers say, else to the centre.
    """

    size: tuple[int, int] | None = None
    box: tuple[int, int, int, int] | None = None
    random_crop: bool = False

    def __call__(self, image: np.ndarray, name: str, u: np.ndarray | None = None) -> np.ndarray:
        """`name` is for the error message; u = two numbers in [0, 1) for the top and left of a random crop."""
        if self.box is not None:
            left, top, right, bottom = self.box
            if image.shape[0] < bottom or image.shape[1] < right:
                raise InputError(
                    f"{name} is {size_text(image.shape)} (height x width): the crop box of this dataset needs at least "
                    f"{bottom}x{right}; use the original aligned images, or --dataset folder"
                )
            image = image[top:bottom, left:right]
        if self.size is None or image.shape[:2] == self.size:
            return image
        (h, w), (height, width) = image.shape[:2], self.size
        image = _resize(image, *((height, w * height // h) if h * width <= w * height else (h * width // w, width)))
        spare = image.shape[0] - height, image.shape[1] - width
        if u is None:
            top, left = (round(s / 2.0) for s in spare)
        else:
            top, left = (int(float(v) * (s + 1)) for v, s in zip(u, spare, strict=True))
        return image[top : top + height, left : left + width]


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """PIL's bilinear resize of uint8 [h,w,C] for any C: channels are independent of each other in PIL, too."""
    if image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    planes = (Image.fromarray(np.ascontiguousarray(image[:, :, c])) for c in range(image.shape[2]))
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) for p in planes], axis=2)


def size_text(shape: tuple[int, ...]) -> str:
    """'218x178' for a shape that starts with height and width."""
    return f"{shape[0]}x{shape[1]}"


MAX_SIDE = 4096
"""Of an image that a model or `--image-size` names: 16 times that of the largest published NVAE."""


def check_side(height: int, width: int) -> None:
    """InputError for an image with a side above MAX_SIDE."""
    if max(height, width) > MAX_SIDE:
        raise InputError(f"image {size_text((height, width))}: expected at most {MAX_SIDE} pixels a side; use --image-size 256")


def check_size(height: int, width: int, stride: int, *, padding: int = 0) -> None:
    """Raise an InputError unless height and width (pixels, padding included) are multiples of the model's stride.

    Args:
        stride: the product of all the model's reductions (2 for each pre-processing block and each scale but one).
        padding: pixels of zeros on each side that height and width contain; `--image-size` does not count them.
    """
    check_side(height, width)
    if stride > MAX_SIDE:
        halvings = stride.bit_length() - 1
        raise InputError(
            f"{halvings} halvings of the image: expected at most {MAX_SIDE.bit_length() - 1}; use fewer --num-latent-scales or "
            "--num-preprocess-blocks"
        )
    if height > 0 and width > 0 and height % stride == 0 and width % stride == 0:
        return
    below = height // stride * stride, width // stride * stride
    above = -(-max(height, 1) // stride) * stride, -(-max(width, 1) // stride) * stride
    fitting = [size for size in (below, above) if min(size) > 2 * padding]
    if not fitting:  # the padding alone is wider than the next size
        step = -(-(2 * padding + 1) // stride) * stride
        fitting = [(step, step)]
    best = min(fitting, key=lambda size: (abs(size[0] - height) + abs(size[1] - width), -size[0]))

    def text(size: tuple[int, int]) -> str:
        return str(size[0]) if size[0] == size[1] and height == width else size_text(size)

    several = len(fitting) == 2
    sizes = f"the nearest sizes are {text(below)} and {text(above)}" if several else f"the nearest size is {text(best)}"
    padded = f" (with {padding} pixels of padding on each side)" if padding else ""
    cure = text((best[0] - 2 * padding, best[1] - 2 * padding))
    image = size_text((height, width)) + padded
    fewer = " or fewer --num-latent-scales" if stride > min(height, width) else ""
    raise InputError(f"image {image} must be divisible by {stride}: {sizes}; use --image-size {cure}{fewer}")
