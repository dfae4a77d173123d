"""Helpers of the benchmarks: the device, interleaved timing, peak memory, and rows of a Markdown table."""

import importlib
import resource
import time

import torch

from proxy_anchor import hardware


def device_here() -> torch.device:
    """The device for benchmarks of single functions: the first CUDA device, else Apple's GPU or the CPU."""
    return hardware.select(0)


def interleaved(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function over the rounds, after a warm-up round.

    Each round runs all functions, so a slow moment of the machine affects all of them.
    """
    times = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: sorted(values[1:])[rounds // 2] for name, values in times.items()}


def seconds(function) -> float:
    """Seconds of function(), including the work on the GPU."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def peak_bytes(function) -> int:
    """The increase of peak memory during function(), on the CUDA device or else in the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def installed(library: str, row: str):
    """Import an optional module; if it is missing, print a row and return None."""
    try:
        return importlib.import_module(library)
    except ImportError:
        print_row(row, "not installed")


def print_row(name: str, value: str, compared: str = "") -> None:
    print(f"| {name:<52} | {value:>16} | {compared:<30} |", flush=True)


def print_ratios(medians: dict[str, float], of: str) -> None:
    """Print a row for each function: its median, and the ratio of the median of `of` to it."""
    for name, median in medians.items():
        print_row(name, f"{1e3 * median:.2f} ms", f"{of} / this: {medians[of] / median:.2f}")
