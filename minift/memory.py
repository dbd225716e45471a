"""What the process holds: its peak, and returning what it does not use."""

import ctypes
import resource
import sys

import torch


def peak_memory_mib(device) -> float:
    """Most memory so far, MiB: allocated on a CUDA device, resident in the whole process elsewhere."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # Linux counts KiB, macOS bytes


def release_free_memory() -> None:
    """Give the C heap's free pages back to the system, where glibc is the C library.

    Tensors of ever new sizes leave gaps that the heap keeps: 640 of 1840 MiB after 14 steps of the demo, and
    90 of 195 MiB once while SmolLM2 was quantized layer by layer.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
