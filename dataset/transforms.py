"""What happens to an image between its file and the network.

The geometry (crop, resize, flip) is done on 8-bit images by the workers; the network's `normalize` then makes them
floats on its device. Equal to the published pipeline, with a quarter of the bytes to move.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

CROP = 0.875  # share of the resized shorter side that evaluation keeps: 224 of 256, as published
RESIZED = {224: 256, 256: 292, 324: 361, 448: 512}  # crop: shorter side before it, as in the paper, which rounds freely


class RandomCrop:
    """uint8 (3, H, W) -> crop of a random share of its area, mirrored half of the time: (3, image_size, image_size).

    What v2.RandomResizedCrop and v2.RandomHorizontalFlip do, in two thirds of their time: the resize is fast on images
    in channels_last, which a crop is only once it is copied. The same to the last bit, where torch is recent; torch 2.6
    rounds some pixels otherwise. interpolation: see evaluation.
    """

    def __init__(
        self,
        image_size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        interpolation: str | None = None,
    ):
        self.crop = v2.RandomResizedCrop(image_size, scale=scale)
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


def evaluation(
    image_size: int, crop: float = CROP, crop_mode: str = "center", interpolation: str | None = None
) -> v2.Transform:
    """uint8 (3, H, W) -> resized, then the central crop: (3, image_size, image_size).

    crop: the share of the shorter side that is kept; 1 loses nothing of a square image. crop_mode: "squash" makes the
    image square instead of cutting off its longer side. interpolation: of Pillow, "bilinear" or "bicubic", to the pixel
    as timm's networks saw their images; None resizes as the published networks did, by the sizes of the paper.
    """
    told = recipe(image_size, crop, crop_mode, interpolation)
    resize = v2.Resize(told["resize"], interpolation=_mode(told["interpolation"]), antialias=True)
    central = v2.CenterCrop(told["crop"])
    return _through_pillow(resize, central) if interpolation else v2.Compose([resize, central])


def recipe(image_size: int, crop: float = CROP, crop_mode: str = "center", interpolation: str | None = None) -> dict:
    """What evaluation does, in numbers for other programs: {"resize", "interpolation", "crop"}.

    resize: to how many pixels the shorter side is resized, or [height, width] of all images. crop: the side of the
    central square that is kept.
    """
    resize = int(image_size / crop)
    if interpolation is None and crop == CROP:
        resize = RESIZED.get(image_size, resize)
    squashed = interpolation is not None and crop_mode == "squash"
    return {
        "resize": [resize, resize] if squashed else resize,
        "interpolation": interpolation or "bilinear",
        "crop": image_size,
    }


def _through_pillow(*transforms):
    """Tensors' resize rounds up to 2% of the pixels otherwise than Pillow's, by 1 or 2 of 255."""
    return v2.Compose([v2.ToPILImage(), *transforms, v2.PILToTensor()])


def _mode(interpolation):
    return InterpolationMode(interpolation)
