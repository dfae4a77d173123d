"""Interleaved timing of several functions: each round runs all of them, so a slow moment of the machine hits all."""

import time

import torch


def interleaved(functions: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each function over the rounds, after one that is not counted."""
    times = {name: [] for name in functions}
    for _ in range(1 + rounds):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(seconds[1:])[rounds // 2] for name, seconds in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_ratios(medians: dict[str, float], of: str) -> None:
    """A line for each function: its median, and how many times longer than it `of` takes."""
    for name, seconds in medians.items():
        print(f"{name:<44} {1e3 * seconds:10.2f} ms   {of} / this: {medians[of] / seconds:6.2f}")
