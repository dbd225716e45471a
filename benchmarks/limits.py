"""What this machine is, and can do, measured once a process; and the roofline plot.

A copy counts the bytes it reads and those it writes. Work that moves `bytes` and computes `flops` takes at
least max(bytes / copy bandwidth, flops / matmul rate): that is the limit rows are held against. Data that
stays in a cache can beat it.
"""

import os
import platform
import subprocess
import time
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGES = (
    *("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes", "torchao"),
    *("scikit-learn", "sacrebleu", "rouge-score"),
)
CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _fastest(call, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls: a limit is what was reached once."""
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


@cache
def copy_bandwidth() -> float:
    """Bytes read plus bytes written, a second, by copying 2 GiB (on a CPU, 256 MiB)."""
    source = torch.ones(2**31 if DEVICE == "cuda" else 2**28, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source))


@cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Operations a second of torch's product of two square matrices, 8192 (on a CPU, 2048) a side."""
    n = 8192 if DEVICE == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b)


@cache
def l2_bytes() -> int:
    """The GPU's L2 cache; on a CPU that of one core, 0 where it is not known."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    size = CPU_CACHES / "index2" / "size"  # as "2048K"
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 0


def limits() -> dict[str, float]:
    found = {"L2 MiB": l2_bytes() / 2**20, "copy GB/s": copy_bandwidth() / 1e9}
    for name in ("float32", "bfloat16"):
        found[f"{name} TFLOP/s"] = matmul_rate(getattr(torch, name)) / 1e12
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def machine() -> dict:
    """Processor, memory, accelerator, measured limits, versions and commit that a figure belongs to."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "limits": limits(),
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def roofline(rows: list[dict], limits: dict[str, float], path: Path) -> None:
    """TFLOP/s over flop/byte under the measured roof; where nothing multiplies, GB/s over the bytes moved.

    Draws nothing where matplotlib is not installed or the rows have no such rates.
    """
    points = [row for row in rows if isinstance(row.get("TFLOP/s"), float)]
    multiplies = bool(points)
    points = points or [row for row in rows if "GB/s" in row]
    if not points or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    x, y = ("flop/byte", "TFLOP/s") if multiplies else ("MB moved", "GB/s")
    places = [1e3 * row["TFLOP/s"] / row["GB/s"] if multiplies else row["GB/s"] * row["ms"] for row in points]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for peer in dict.fromkeys(key[:-3] for row in points for key in row if key.endswith(" ms")):
        there = [
            (p, r[y] * r["ms"] / r[f"{peer} ms"])
            for p, r in zip(places, points, strict=True)
            if f"{peer} ms" in r
        ]
        axes.scatter(*zip(*there, strict=True), s=16, alpha=0.6, label=peer)
    axes.scatter(places, [row[y] for row in points], s=28, color="black", label="minift", zorder=3)
    ends, bandwidth = (min(places) / 1.5, max(places) * 1.5), limits["copy GB/s"]
    for dtype in dict.fromkeys(row["dtype"] for row in points) if multiplies else ():
        rate = limits[f"{dtype} TFLOP/s"]
        knee = min(max(1e3 * rate / bandwidth, ends[0]), ends[1])
        roof = [min(rate, bandwidth * place / 1e3) for place in (ends[0], knee, ends[1])]
        axes.plot((ends[0], knee, ends[1]), roof, label=f"measured limit, {dtype}")
    if not multiplies:
        axes.plot(ends, (bandwidth, bandwidth), label="measured limit, copy")
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y, title=points[0]["op"])
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
