"""The main job on embedded defaults: SmolLM2 learns to say what a Python function does.

Evaluates, trains LoRA, evaluates again, and prints both side by side. The rows come from the standard library
of the Python that runs this (data/stdlib_docstrings.py); the 48 functions of the evaluation come from modules
that training never sees.
"""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

from minift.data.collate import encode_prompt
from minift.data.stdlib_docstrings import pairs, split
from minift.data.tokenizer import Tokenizer
from minift.fetch import fetch
from minift.load import load_model, load_tokenizer
from minift.memory import peak_memory_mib
from minift.methods import apply
from minift.methods.lora import LoRA
from minift.methods.qlora import QLoRA
from minift.metrics.language_model import perplexity
from minift.metrics.rouge import rouge
from minift.models.disk import write_text
from minift.models.generate import generate
from minift.models.interface import LanguageModel
from minift.training.evaluation import evaluate_loss
from minift.training.loop import train
from minift.training.settings import TrainConfig

METHODS = {  # with its learning rate: with five times as many trained numbers, half of it
    "lora": (LoRA(r=8, alpha=16, target_modules=("q_proj", "v_proj")), 2e-3),
    "qlora": (QLoRA(r=8, alpha=16), 1e-3),
}
GENERATION_BATCH = 16
MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Size:
    held_out: int
    train_rows: int
    train: TrainConfig


FULL = Size(48, 640, TrainConfig(output="out/demo", warmup_steps=5))
QUICK = Size(16, 96, TrainConfig(output="out/demo-quick", warmup_steps=2))


def run(quick: bool = False, output: str = "", method: str = "lora") -> dict:
    """Fetch, evaluate, train, evaluate, print; returns what it printed and writes it to demo.json."""
    start = time.perf_counter()
    size = QUICK if quick else FULL
    if method not in METHODS:
        raise ValueError(f"the demo's methods are {', '.join(METHODS)}; got {method!r}")
    chosen, learning_rate = METHODS[method]
    folder = output or size.train.output + ("" if method == "lora" else f"-{method}")
    config = replace(size.train, learning_rate=learning_rate, output=folder)
    fetch("smollm2")
    rows, held_out = split(pairs(), size.held_out)
    rows = rows[: size.train_rows]
    tokenizer = load_tokenizer("smollm2")
    model = load_model("smollm2", dtype="bfloat16", quantize=getattr(chosen, "quantization", None))
    print(f"{len(rows)} functions to learn from, {len(held_out)} held out, from other modules\n")
    plan = apply(model, chosen)
    print(*[table.totals() for table in [model.quantization_table] if table], plan, sep="\n", end="\n\n")

    before = evaluate(model, tokenizer, held_out, config)  # B is zero: the base model
    metrics = train(model, tokenizer, rows, config, overwrite=not output)
    after = evaluate(model, tokenizer, held_out, config)

    result = {
        "before": before["scores"],
        "after": after["scores"],
        "train": metrics,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_mib": round(peak_memory_mib("cpu")),
    }
    write_text(Path(config.output) / "demo.json", json.dumps(result, indent=2) + "\n")
    print(_samples(held_out[:5], before["answers"], after["answers"]))
    print(_table(result["before"], result["after"]))
    print(f"\n{plan.totals()}")
    print(
        f"training {metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:.0f} tokens/s; "
        f"everything {result['seconds']:.0f} s; peak memory {result['peak_memory_mib']} MiB"
    )
    print(f"adapter (PEFT layout), log.jsonl, loss.png and demo.json: {Path(config.output).resolve()}")
    return result


def evaluate(model: LanguageModel, tokenizer: Tokenizer, rows: list[dict], config: TrainConfig) -> dict:
    """Perplexity of the reference sentences, and ROUGE F1 of greedy answers to them."""
    loss = evaluate_loss(model, tokenizer, rows, config)
    prompts = [encode_prompt(tokenizer, row["prompt"], config.template) for row in rows]
    answers = [""] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    for i in range(0, len(rows), GENERATION_BATCH):
        batch = by_length[i : i + GENERATION_BATCH]
        new = generate(
            model,
            [prompts[j] for j in batch],
            MAX_NEW_TOKENS,
            eos_ids=tokenizer.eos_ids,
            pad_id=tokenizer.pad_id,
        )
        for j, ids in zip(batch, new, strict=True):
            answers[j] = tokenizer.decode(ids).strip()
    scores = rouge(answers, [row["completion"] for row in rows], variants=("rouge1", "rouge2", "rougeL"))
    return {
        "answers": answers,
        "scores": {
            "perplexity": round(perplexity(loss, 1), 2),
            **{name: round(f1, 4) for name, (_, _, f1) in scores.items()},
        },
    }


def _table(before: dict, after: dict) -> str:
    lines = [f"{'held-out functions':<22}{'before':>10}{'after':>10}"]
    names = {
        "perplexity": "perplexity",
        "rouge1": "ROUGE-1 F1",
        "rouge2": "ROUGE-2 F1",
        "rougeL": "ROUGE-L F1",
    }
    for key, name in names.items():
        digits = 2 if key == "perplexity" else 4
        lines.append(f"{name:<22}{before[key]:>10.{digits}f}{after[key]:>10.{digits}f}")
    return "\n".join(lines)


def _samples(rows: list[dict], before: list[str], after: list[str]) -> str:
    parts = []
    for row, old, new in zip(rows, before, after, strict=False):
        head = next(
            line for line in row["prompt"].split("\n") if line.lstrip().startswith(("def ", "async def "))
        )
        parts.append(
            f"{row['module']}: {head.strip()}\n  reference  {row['completion']}\n"
            f"  before     {_one_line(old)}\n  after      {_one_line(new)}\n"
        )
    return "\n" + "\n".join(parts)


def _one_line(text: str, width: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
