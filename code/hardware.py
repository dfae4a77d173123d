"""The device that a script runs on."""

import argparse
from collections.abc import Collection

import torch

from proxy_anchor import cli

CHANNELS_LAST_FROM = 96  # pixels: on a CPU, smaller images are faster in torch's own layout


def options(without: Collection[str] = ()) -> argparse.ArgumentParser:
    """Command-line flags of the device, without these flags."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("device")
    add = cli.adder(group, without)
    add(
        "--gpu-id",
        default=0,
        type=cli.integer(-1),
        metavar="N",
        help="CUDA device, or -1 for all (search.py: the first one); without CUDA, Apple's GPU or the CPU",
    )
    add(
        "--amp",
        default="none",
        **cli.one_of("none", "bf16", "fp16"),
        help="mixed precision: bf16 for recent GPUs, fp16 for older ones; none: float32",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network (torch.compile): takes a minute, then steps are faster; for long runs",
    )
    return parser


def to_device(network: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The network on the device. On a CPU its convolutions take the layout of the images, see memory_format."""
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return network.to(device, memory_format=layout)  # type: ignore[call-overload]


def memory_format(device: torch.device, image_size: int) -> torch.memory_format:
    """The memory layout in which convolutions are fastest, for images of this size."""
    fast = device.type == "cuda" or (device.type == "cpu" and image_size >= CHANNELS_LAST_FROM)
    return torch.channels_last if fast else torch.contiguous_format


def select(gpu_id: int) -> torch.device:
    """CUDA device `gpu_id`, the first one for -1; without CUDA Apple's GPU or the CPU.

    Raises ValueError for an id that does not exist.
    TF32 is turned off: convolutions would use it by default, and the published results are of float32.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if torch.cuda.is_available():
        gpu_id, count = 0 if gpu_id == -1 else gpu_id, torch.cuda.device_count()
        if not 0 <= gpu_id < count:
            raise ValueError(f"There is no CUDA device {gpu_id}: --gpu-id can be 0 to {count - 1} here")
        torch.cuda.set_device(gpu_id)  # else code that names no device would use the first one too
        return torch.device("cuda", gpu_id)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """One line on the device in use."""
    if device.type == "cuda":
        return f"Running on CUDA device {device.index}, {torch.cuda.get_device_name(device)}."
    name = "Apple's GPU (MPS)" if device.type == "mps" else f"the CPU (threads: {torch.get_num_threads()})"
    return f"No CUDA device here: running on {name}."
