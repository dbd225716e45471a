"""One LoRA training step of SmolLM2-135M: minift beside transformers + peft.

bf16 base, fp32 adapters, r = 8 on q and v, batch 4 x 128, AdamW. Both sides run in a process of their own and
take turns step by step; they start from the same adapter file and see the same batches. Gate: the losses of
20 steps agree within 1 %. Labels: on the completions only (as in fine-tuning), and on every token.

The limit on CPUs is arithmetic: 4 x 106 M flops a token for the blocks (forward, and backward to the inputs)
and 4 x 28 M a supervised token for the head; the table gives it as Gflop/s reached.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import gate, quantiles

B, T, STEPS = 4, 128, 20
LEARNING_RATE = 2e-4
BLOCKS, HEAD = 106_168_320, 28_311_552  # weights that a token meets


def batches(labels: str) -> list[dict]:
    """STEPS batches of B rows from the standard library, T tokens each, padded on the right."""
    from minift.data.collate import collate, encode_row
    from minift.data.rows import check_row
    from minift.data.stdlib_docstrings import pairs
    from minift.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2")
    examples = []
    for i, row in enumerate(pairs()):
        example = encode_row(tokenizer, check_row(row, f"row {i}"), "none", 10**6)
        if T - 32 <= len(example) <= T:
            examples.append(example)
        if len(examples) == B * STEPS:
            break
    made = []
    for i in range(0, B * STEPS, B):
        batch = collate(examples[i : i + B], tokenizer.pad_id)
        pad = T - batch["input_ids"].shape[1]
        fill = {"input_ids": tokenizer.pad_id, "attention_mask": 0, "labels": -100}
        batch = {k: torch.nn.functional.pad(v, (0, pad), value=fill[k]) for k, v in batch.items()}
        if labels == "every token":
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        made.append(batch)
    return made


def minift_step(folder: str, lr: float):
    import minift
    from minift.methods.base import trainable
    from minift.training.objective import Objective

    model = minift.load_model(f"{folder}/base", dtype="bfloat16")
    minift.load_adapter(model, f"{folder}/adapter")
    model.train()
    objective = Objective(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=lr, weight_decay=0.0, fused=True)

    def step(batch):
        loss_sum, tokens = objective(batch)
        loss = loss_sum / tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def peft_step(folder: str, lr: float):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, f"{folder}/adapter", is_trainable=True)
    model.train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True
    )

    def step(batch):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def worker(side: str, folder: str) -> None:
    """Answer each line on stdin (a batch number) with {loss, seconds, peak MiB} of one step."""
    import time

    step = {"minift": minift_step, "transformers + peft": peft_step}[side](folder, LEARNING_RATE)
    data = _read(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        loss = step(data[int(line)])
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"loss": loss, "seconds": seconds, "peak_mib": peak}), flush=True)


def _read(folder):
    from safetensors.torch import load_file

    flat = load_file(f"{folder}/batches.safetensors")
    return [{k: flat[f"{i}.{k}"] for k in ("input_ids", "attention_mask", "labels")} for i in range(STEPS)]


def measure(folder: str, labels: str, rounds: int) -> dict:
    """side -> records of rounds x STEPS steps, the sides taking turns."""
    from safetensors.torch import save_file

    data = batches(labels)
    save_file(
        {f"{i}.{k}": v.contiguous() for i, b in enumerate(data) for k, v in b.items()},
        f"{folder}/batches.safetensors",
    )
    sides, records = {}, {}
    for side in ("minift", "transformers + peft"):
        sides[side] = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.bench_train_step", "--worker", side, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent.parent,
        )
        records[side] = []
        while (line := sides[side].stdout.readline()).strip() != "ready":
            if not line:
                raise RuntimeError(f"the {side} worker ended before its first step")
    for n in range(rounds * STEPS):
        for side, process in sides.items():
            process.stdin.write(f"{n % STEPS}\n")
            process.stdin.flush()
            records[side].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.stdin.close()
        process.wait()
    supervised = statistics.mean(int((b["labels"][:, 1:] != -100).sum()) for b in data)
    return {"records": records, "supervised": supervised}


def run(quick: bool) -> tuple[list[dict], dict]:
    import minift

    rows, details = [], {"losses": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = minift.load_model("smollm2", dtype="bfloat16")
        minift.save_model(model, f"{folder}/base")
        model = minift.load_model(f"{folder}/base", dtype="bfloat16")
        minift.apply(model, minift.LoRA(r=8, alpha=16))
        minift.save_adapter(model, f"{folder}/adapter")
        del model
        for labels in ("completion",) if quick else ("completion", "every token"):
            measured = measure(folder, labels, rounds=1)
            records = measured["records"]
            losses = {side: [r["loss"] for r in rs[:STEPS]] for side, rs in records.items()}
            ours, theirs = losses["minift"], losses["transformers + peft"]
            worst = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
            gate(f"losses of {STEPS} steps, labels on {labels}", worst, 0.01)
            times = {side: quantiles([r["seconds"] for r in rs[3:]]) for side, rs in records.items()}
            ratios = [
                b["seconds"] / a["seconds"]
                for a, b in zip(records["minift"][3:], records["transformers + peft"][3:], strict=True)
            ]
            flops = 4 * (BLOCKS * B * T + HEAD * measured["supervised"])
            for side, t in times.items():
                rows.append(
                    {
                        "labels": labels,
                        "side": side,
                        "median s": t["median"],
                        "p20": t["p20"],
                        "p80": t["p80"],
                        "tokens/s": round(B * T / t["median"]),
                        "Gflop/s": round(flops / t["median"] / 1e9),
                        "peak MiB": round(max(r["peak_mib"] for r in records[side])),
                        "speed": 1.0 if side != "minift" else round(statistics.median(ratios), 2),
                    }
                )
            details["losses"][labels] = {**losses, "largest relative difference": worst}
    return rows, details


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker", nargs=2, required=True, metavar=("SIDE", "FOLDER"))
    side, folder = parser.parse_args().worker
    worker(side, folder)
