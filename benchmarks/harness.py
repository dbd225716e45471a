"""What every benchmark shares: alternating timing, quantiles, the machine, results as JSON and a table.

A benchmark checks first that the candidates compute the same thing and times nothing when they do not.
"""

import json
import os
import platform
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


class Mismatch(Exception):
    """The correctness gate is red; nothing was timed."""


def gate(name: str, error: float, bound: float) -> None:
    if not error <= bound:
        raise Mismatch(f"{name}: error {error:.3g} is above the bound {bound:.3g}; nothing was timed")


def alternate(candidates: dict, repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call; the candidates take turns, so that a drift of the machine meets all of them."""
    times = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def pick(q):
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    return {"median": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def machine() -> dict:
    """Processor, memory, accelerator, versions and commit that a figure belongs to."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().split("\n")
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
        flags = next((line for line in lines if line.startswith("flags")), "")
        cpu += "".join(f", {flag}" for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "numpy", "transformers", "peft", "bitsandbytes"):
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
        "versions": versions,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


def table(rows: list[dict]) -> str:
    """Markdown, columns in the order of the first row."""
    columns = list(rows[0])
    text = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *text]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(name: str, rows: list[dict], details: dict, write: bool) -> None:
    """Print the table; write results/<name>.json and .md."""
    where = machine()
    print(table(rows), flush=True)
    if write:
        RESULTS.mkdir(exist_ok=True)
        result = {"machine": where, "rows": rows, **details}
        (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        heading = (
            f"# {name}\n\n{where['cpu']}; {where['threads']} threads; GPU: {where['gpu'] or 'none'}; "
            + ", ".join(f"{k} {v}" for k, v in where["versions"].items())
            + f"; commit {where['commit']}, {where['date']}\n\n"
        )
        (RESULTS / f"{name}.md").write_text(heading + table(rows) + "\n")
