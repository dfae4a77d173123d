"""The random states of a process: torch's, of the CPU and of each GPU, numpy's and Python's."""

import random
from typing import Any

import numpy as np
import torch


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


def state() -> dict:
    """The random states, as tensors and numbers."""
    numpy_state: Any = np.random.get_state()
    _, keys, *numpy_rest = numpy_state
    version, python_keys, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *numpy_rest),
        "python": (version, torch.tensor(python_keys), gauss),
    }


def restore(state: dict) -> None:
    """Restore the states; GPUs that are missing now, or were missing then, are skipped."""
    torch.set_rng_state(state["torch"])
    for gpu, gpu_state in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(gpu_state, gpu)
    keys, *numpy_rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numpy_rest))
    version, python_keys, gauss = state["python"]
    random.setstate((version, tuple(python_keys.tolist()), gauss))
