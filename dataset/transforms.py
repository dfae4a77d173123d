"""The geometric transforms of images for training and evaluation.

Workers crop, resize and flip 8-bit images; the network's `normalize` then converts them to floats on its device. The
result equals the published pipeline, with a quarter of the bytes to move.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from proxy_anchor.spec import CROP

RESIZED = {224: 256, 256: 292, 324: 361, 448: 512}  # {crop: resized shorter side} of the paper, irregularly rounded


class RandomCrop:
    """Crop a random share of the area and mirror half of the images: uint8 (3, H, W) -> (3, image_size, image_size).

    Equals v2.RandomResizedCrop and v2.RandomHorizontalFlip of torchvision (bit by bit, except for some pixels with
    torch 2.6), in two thirds of the time: see resize.
    interpolation: see Evaluation.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        interpolation: str | None = None,
    ):
        from torchvision.transforms import v2  # which takes longer to import than torch

        self.crop = v2.RandomResizedCrop(image_size, scale=scale)
        self.area = image_size**2 / (scale[0] * self.crop.ratio[0])  # in larger images, no crop has to be enlarged
        self.flip = flip
        self.interpolation = interpolation

    def __call__(self, image):
        box = self.crop.make_params([image])
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        resized = resize(image[:, rows, columns], *self.crop.size, self.interpolation)
        return resized.flip(-1) if self.flip and torch.rand(1) < 0.5 else resized


class Evaluation:
    """Resize and crop the center: uint8 (3, H, W) -> (3, image_size, image_size).

    crop: the share of the shorter side that is kept; 1 keeps all of a square image. crop_mode: "squash" makes the image
    square instead of cropping its longer side. interpolation: "bilinear" or "bicubic" by Pillow, exactly as for timm's
    networks; None resizes as for the published networks, to the sizes of the paper. Equals v2.Resize and v2.CenterCrop
    of torchvision, whose import would take longer than the search in an index. (Where a CPU lacks AVX2, torchvision
    resizes in float32: there, some pixels differ by 1.)
    """

    def __init__(
        self, image_size: int, crop: float = CROP, crop_mode: str = "center", interpolation: str | None = None
    ):
        self.image_size, self.interpolation = image_size, interpolation
        self.target = recipe(image_size, crop, crop_mode, interpolation)["resize"]

    def __call__(self, image):
        height, width = image.shape[-2:]
        if isinstance(self.target, list):
            height, width = self.target
        else:
            short = min(height, width)
            height, width = (int(self.target * side / short) for side in (height, width))
        resized = resize(image, height, width, self.interpolation)
        top, left = (round((side - self.image_size) / 2) for side in (height, width))
        return resized[:, top : top + self.image_size, left : left + self.image_size]

    def __repr__(self):
        return f"Evaluation({self.image_size}, resize={self.target}, interpolation={self.interpolation})"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what it makes of an image."""
        return self.image_size, self.image_size


class Reduction:
    """Shrink an image to an area, in pixels; smaller ones stay as they are: uint8 (3, H, W) -> (3, H', W')."""

    def __init__(self, area: float):
        self.area = area

    def __call__(self, image):
        size = self.size(*image.shape[-2:])
        return resize(image, *size)

    def __repr__(self):
        return f"Reduction({self.area:g})"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what it makes of an image."""
        scale = min(1, (self.area / (height * width)) ** 0.5)
        return max(1, round(height * scale)), max(1, round(width * scale))


def recipe(image_size: int, crop: float = CROP, crop_mode: str = "center", interpolation: str | None = None) -> dict:
    """The settings of Evaluation, for other programs: {"resize", "interpolation", "crop"}.

    resize: the shorter side in pixels, or [height, width]. crop: the side of the central square in pixels.
    """
    resize = int(image_size / crop)
    if interpolation is None and crop == CROP:
        resize = RESIZED.get(image_size, resize)
    squash = interpolation is not None and crop_mode == "squash"
    return {
        "resize": [resize, resize] if squash else resize,
        "interpolation": interpolation or "bilinear",
        "crop": image_size,
    }


def resize(image: torch.Tensor, height: int, width: int, interpolation: str | None = None) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, height, width), with antialiasing.

    interpolation: "bilinear" or "bicubic" by Pillow; None for torch's bilinear, which differs from Pillow's in up to 2%
    of the pixels, by 1 or 2 of 255. torch is fast on images in channels_last.
    """
    if image.shape[-2:] == (height, width):
        return image
    if interpolation:
        resample = Image.Resampling[interpolation.upper()]
        resized = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), resample)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    pixels = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]
