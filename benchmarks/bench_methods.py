"""Every method on the demo's task: perplexity, size, speed, memory and file. Needs: minift fetch smollm2.

SmolLM2 in bf16 learns from 160 functions (20 steps of 8 rows) with the demo's settings; perplexity is that of
the demo's 48 held-out sentences: of the base, at the method's start, and after training. Each method runs in
a process of its own, whose largest memory is given: loading, both evaluations and saving count. The file is
what using the adapter needs, or the whole model where everything trained. The learning rates are usual ones
for each method, chosen before any of these numbers was seen and tuned on none of them.

Gate: the trained numbers are those of the law; a method that starts as its base has the base's loss to the
bit; training leaves a finite loss that is lower on the first of the rows that it saw. A method that refuses
the model, or whose gate is red, says so instead of its numbers.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from benchmarks.harness import Mismatch, gate, peer
from minift import demo
from minift.data.stdlib_docstrings import pairs, split
from minift.load import load_model, load_tokenizer
from minift.memory import peak_memory_mib
from minift.methods import METHODS, apply
from minift.methods.adalora import AdaLoRA
from minift.methods.base import trainable
from minift.methods.bitfit import BitFit
from minift.methods.bottleneck import Bottleneck
from minift.methods.dora import DoRA
from minift.methods.full import Full
from minift.methods.ia3 import IA3
from minift.methods.ln_tuning import LNTuning
from minift.methods.p_tuning import PTuning
from minift.methods.prefix_tuning import PrefixTuning
from minift.methods.prompt_tuning import PromptTuning
from minift.methods.selective import Selective
from minift.training.evaluation import evaluate_loss
from minift.training.log import read_log
from minift.training.loop import train

QUICK = ("lora",)
LEARNT = 32  # rows of the training set whose loss must fall
RUNS = {  # with its learning rate
    **demo.METHODS,
    "full": (Full(), 1e-4),
    "selective": (Selective(last_blocks=2, head=False), 5e-4),
    "dora": (DoRA(r=8, alpha=16, target_modules=("q_proj", "v_proj")), 2e-3),
    "adalora": (AdaLoRA(r=12, target_r=8, tinit=2, tfinal=6, target_modules=("q_proj", "v_proj")), 2e-3),
    "prompt_tuning": (PromptTuning(), 5e-2),
    "p_tuning": (PTuning(), 5e-3),
    "prefix_tuning": (PrefixTuning(), 1e-2),
    "bitfit": (BitFit(), 1e-3),
    "ln_tuning": (LNTuning(), 1e-2),
    "ia3": (IA3(), 1e-2),
    "bottleneck": (Bottleneck(), 2e-3),
}


def run(quick: bool) -> tuple[list[dict], dict]:
    missing = METHODS.keys() ^ RUNS.keys()
    if missing:
        raise Mismatch(f"RUNS and METHODS differ in {', '.join(sorted(missing))}")
    rows, losses = [], {}
    for name in QUICK if quick else METHODS:
        command = [sys.executable, "-m", "benchmarks.bench_methods", name, *(["--quick"] if quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        if done.returncode:
            row = {"method": name, "no numbers": f"its process ended with {done.returncode}"}
        else:
            row = json.loads(done.stdout.splitlines()[-1])
        losses[name] = row.pop("losses", None)
        print(row, flush=True)
        rows.append(row)
    return rows, {"training losses": losses, "learning rates": {name: RUNS[name][1] for name in losses}}


def measure(name: str, quick: bool) -> dict:
    """The row of one method, in the process that has run nothing else; or why there is none."""
    row, failed = {"method": name, "rate": RUNS[name][1]}, {}
    with peer(name, failed), tempfile.TemporaryDirectory() as folder:
        row |= tune(name, quick, Path(folder))
    return {"method": name, "no numbers": failed[name]} if failed else row


def tune(name: str, quick: bool, folder: Path) -> dict:
    """Evaluate, train, evaluate."""
    method, rate = RUNS[name]
    rows, held_out = split(pairs(), demo.FULL.held_out)
    rows, held_out = rows[: 16 if quick else 160], held_out[: 8 if quick else None]
    config = replace(demo.FULL.train, learning_rate=rate, output=str(folder))
    tokenizer, quantization = load_tokenizer("smollm2"), getattr(method, "quantization", None)
    model = load_model("smollm2", "float32" if name == "full" else "bfloat16", quantize=quantization)

    def nats(rows):
        return evaluate_loss(model, tokenizer, rows, config)

    base = nats(held_out)
    plan = apply(model, method)
    counted = sum(parameter.numel() for parameter in trainable(model).values())
    gate(f"{name}, trained numbers beside the law's", abs(counted - plan.trainable), 0)
    start, learnt = nats(held_out), nats(rows[:LEARNT])
    if quantization or method.identity_at_init == "bitwise":
        gate(f"{name}, loss at the start beside the base's", abs(start - base), 0)
    train(model, tokenizer, rows, config, quiet=True)
    after, falls = nats(held_out), nats(rows[:LEARNT]) - learnt
    if not (math.isfinite(after) and falls < 0):
        raise Mismatch(
            f"{name}: the loss of trained rows changed by {falls:.3g}, the held-out one is {after}"
        )
    steps = [record for record in read_log(folder / "log.jsonl") if "loss" in record]
    times = [0.0, *(record["elapsed_s"] for record in steps)]
    files = [*folder.glob("adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return {
        "base perplexity": math.exp(base),
        "start": math.exp(start),
        "after": math.exp(after),
        "trainable": plan.trainable,
        "s / step": statistics.median(b - a for a, b in pairwise(times)),
        "peak MiB": round(peak_mib()),
        "file bytes": sum(file.stat().st_size for file in files),
        "losses": [record["loss"] for record in steps],
    }


def peak_mib() -> float:
    """Of this program alone: what `getrusage` says begins at the peak of the process that started it."""
    status = Path("/proc/self/status")
    lines = status.read_text().split("\n") if status.exists() else []
    peaks = [int(line.split()[1]) / 2**10 for line in lines if line.startswith("VmHWM:")]
    return peaks[0] if peaks else peak_memory_mib("cpu")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=RUNS)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.method, arguments.quick)))
