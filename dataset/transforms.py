"""The geometric transforms of images for training and evaluation.

Workers crop, resize and flip 8-bit images; the network's `normalize` then converts them to floats on its device. The
result equals the published pipeline, with a quarter of the bytes to move.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

from proxy_anchor.spec import CROP

RESIZED = {224: 256, 256: 292, 324: 361, 448: 512}  # {crop: resized shorter side} of the paper, irregularly rounded


class RandomCrop:
    """Crop a random share of the area and mirror half of the images: uint8 (3, H, W) -> (3, image_size, image_size).

    Equals v2.RandomResizedCrop and v2.RandomHorizontalFlip (bit by bit, except for some pixels with torch 2.6), in two
    thirds of the time: the resize is fast on images in channels_last, so the crop is copied into that layout first.
    interpolation: see Evaluation.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        interpolation: str | None = None,
    ):
        self.crop = v2.RandomResizedCrop(image_size, scale=scale)
        self.area = image_size**2 / (scale[0] * self.crop.ratio[0])  # in larger images, no crop has to be enlarged
        self.flip = flip
        self.pillow = _through_pillow(v2.Resize(self.crop.size, _mode(interpolation))) if interpolation else None

    def __call__(self, image):
        box = self.crop.make_params([image])
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        if self.pillow:
            resized = self.pillow(image[:, rows, columns])
        else:
            cropped = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
            resized = F.interpolate(cropped, self.crop.size, mode="bilinear", antialias=True)[0]
        return resized.flip(-1) if self.flip and torch.rand(1) < 0.5 else resized


class Evaluation:
    """Resize and crop the center: uint8 (3, H, W) -> (3, image_size, image_size).

    crop: the share of the shorter side that is kept; 1 keeps all of a square image. crop_mode: "squash" makes the image
    square instead of cropping its longer side. interpolation: "bilinear" or "bicubic" by Pillow, exactly as for timm's
    networks; None resizes as for the published networks, to the sizes of the paper.
    """

    def __init__(
        self, image_size: int, crop: float = CROP, crop_mode: str = "center", interpolation: str | None = None
    ):
        settings = recipe(image_size, crop, crop_mode, interpolation)
        resize = v2.Resize(settings["resize"], interpolation=_mode(settings["interpolation"]), antialias=True)
        steps = resize, v2.CenterCrop(settings["crop"])
        self.image_size, self.steps = image_size, _through_pillow(*steps) if interpolation else v2.Compose(steps)

    def __call__(self, image):
        return self.steps(image)

    def __repr__(self):
        return f"Evaluation({self.steps})"

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what it makes of an image."""
        return self.image_size, self.image_size


class Reduction:
    """Shrink an image to an area, in pixels; smaller ones stay as they are: uint8 (3, H, W) -> (3, H', W')."""

    def __init__(self, area: float):
        self.area = area

    def __call__(self, image):
        size = self.size(*image.shape[-2:])
        return image if size == image.shape[-2:] else v2.functional.resize(image, size, antialias=True)

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


def _through_pillow(*transforms):
    """Apply transforms by Pillow: the resize of tensors differs in up to 2% of the pixels, by 1 or 2 of 255."""
    return v2.Compose([v2.ToPILImage(), *transforms, v2.PILToTensor()])


def _mode(interpolation):
    return InterpolationMode(interpolation)
