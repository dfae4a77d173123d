"""What happens to an image between its file and the network.

The geometry (crop, resize, flip) is done on 8-bit images by the workers; `Normalize` then makes them floats on the
network's device. Equal to the published pipeline, with a quarter of the bytes to move.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2

RESIZED = {224: 256, 256: 292, 324: 361, 448: 512}  # crop: shorter side before the crop, as in the paper


class RandomCrop:
    """uint8 (3, H, W) -> crop of a random share of its area, mirrored half of the time: (3, image_size, image_size).

    What v2.RandomResizedCrop and v2.RandomHorizontalFlip do, in two thirds of their time: the resize is fast on images
    in channels_last, which a crop is only once it is copied. The same to the last bit, where torch is recent; torch 2.6
    rounds some pixels otherwise.
    """

    def __init__(self, image_size: int, scale: tuple[float, float] = (0.08, 1.0), flip: bool = True):
        self.crop = v2.RandomResizedCrop(image_size, scale=scale)
        self.flip = flip

    def __call__(self, image):
        box = self.crop.make_params([image])
        rows = slice(box["top"], box["top"] + box["height"])
        columns = slice(box["left"], box["left"] + box["width"])
        cropped = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        resized = F.interpolate(cropped, self.crop.size, mode="bilinear", antialias=True)[0]
        return resized.flip(-1) if self.flip and torch.rand(1) < 0.5 else resized


def evaluation(image_size: int) -> v2.Transform:
    """uint8 (3, H, W) -> resized, then the central crop: (3, image_size, image_size)."""
    resized = RESIZED.get(image_size, int(image_size * 256 / 224))
    resize = v2.Resize(resized, interpolation=InterpolationMode.BILINEAR, antialias=True)
    return v2.Compose([resize, v2.CenterCrop(image_size)])


class Normalize(torch.nn.Module):
    """uint8 RGB images (B, 3, H, W) -> float32 as the network's ImageNet weights expect them.

    bgr: BN-Inception's Caffe format, channels blue, green, red, values 0-255 less the mean; else torchvision's.
    """

    def __init__(self, bgr: bool):
        super().__init__()
        self.bgr = bgr
        mean = [104.0, 117.0, 128.0] if bgr else [0.485, 0.456, 0.406]
        std = [1.0, 1.0, 1.0] if bgr else [0.229, 0.224, 0.225]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images):
        images = images.flip(1).float() if self.bgr else images.float() / 255
        return (images - self.mean) / self.std
