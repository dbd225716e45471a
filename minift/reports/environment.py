"""What `minift env` prints: versions, devices, and which implementation of the kernels runs, and why."""

import os
import platform
from importlib import metadata

import torch

from minift.fetch import cache_folder
from minift.kernels import library, runtime

PACKAGES = (
    "minift",
    "torch",
    "triton",
    "numpy",
    "tokenizers",
    "safetensors",
    "gguf",
    "matplotlib",
    "tensorboard",
)


def environment() -> list[tuple[str, str]]:
    """(what, how it is here), in the order of the page."""
    rows = [("Python", f"{platform.python_version()}, {platform.platform()}")]
    for package in PACKAGES:
        try:
            rows.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            rows.append((package, "not installed"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    rows += [
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
        ("GPU", gpu),
        ("kernels on CPUs", kernels_on("cpu")),
        ("kernels on GPUs", kernels_on("cuda")),
        ("C file", library.WHY),
        ("backend", f"{runtime.setting('backend')} (MINIFT_BACKEND: {', '.join(runtime.BACKENDS)})"),
        ("cache", str(cache_folder())),
    ]
    return rows


def kernels_on(device: str) -> str:
    """The backend of quantized products on a device, or why there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU"
    try:
        return runtime.choose("matmul_4bit", torch.device(device), ("triton", "c", "torch"))
    except RuntimeError as error:
        return str(error)


def run() -> None:
    for what, how in environment():
        print(f"{what:16} {how}")
