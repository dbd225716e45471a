"""SmolLM2 in NF4 beside bf16: one LoRA step, and greedy decoding. Needs: minift fetch smollm2.

LoRA of rank 8 on q and v of both, loss on every token of 4 x 128, AdamW; decoding of one prompt with a cache.
Gate: the quantized model's loss is within 10 % of the dense one's, and the loss of the first step does not
depend on the backend by more than 2^-8 (one rounding of bf16). Limit of a step: that of bf16, whose products
it computes, and reading and writing each weight once more; of decoding: reading the weights, of which the
28 M of the head stay in bf16.
"""

import statistics
from functools import partial

import torch

import minift
from benchmarks.harness import alternate, gate, quantiles
from minift.kernels import runtime
from minift.models.generate import generate
from minift.training.objective import Objective


def prepare(quantize):
    """(model, objective, optimizer) with a LoRA that does not start at zero."""
    model = minift.load_model("smollm2", dtype="bfloat16", quantize=quantize)
    minift.apply(model, minift.LoRA(r=8, alpha=16, target_modules=["q_proj", "v_proj"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, Objective(model), torch.optim.AdamW(trained, lr=1e-5)


def step(objective, optimizer, batch) -> float:
    optimizer.zero_grad()
    total, tokens = objective(batch)
    (total / tokens).backward()
    optimizer.step()
    return total.item() / tokens


def run(quick: bool) -> tuple[list[dict], dict]:
    tokenizer = minift.load_tokenizer("smollm2")
    ids = tokenizer.encode(f"{__doc__} {torch.nn.Module.__doc__}" * 8)
    ids = torch.tensor(ids[: 4 * 128]).view(4, 128)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    sides = {"bf16": prepare(None), "nf4": prepare("nf4")}
    losses = {}
    for backend in ("torch", "auto"):
        with runtime.using(backend), torch.no_grad():
            losses[backend] = [side[1](batch)[0].item() / ids.numel() for side in sides.values()]
    gate("loss in NF4 beside bf16", abs(losses["auto"][1] / losses["auto"][0] - 1), 0.1)
    gate("loss by backend", abs(losses["auto"][1] / losses["torch"][1] - 1), 2**-8)
    prompt, new = ids[0, :16].tolist(), 8 if quick else 32
    work = {
        "LoRA step": {name: partial(step, side[1], side[2], batch) for name, side in sides.items()},
        "greedy decoding": {name: partial(decode, side[0], prompt, new) for name, side in sides.items()},
    }
    rows = []
    for what, calls in work.items():
        tokens = new if what == "greedy decoding" else ids.numel()
        times = alternate(calls, 3 if quick else 7)
        for name, seconds in times.items():
            t = quantiles(seconds)
            pairs = [a / b for a, b in zip(times["bf16"], seconds, strict=True)]
            row = {"what": what, "weights": name, "ms": 1e3 * t["median"]}
            row["p20 - p80"] = f"{1e3 * t['p20']:.4g} - {1e3 * t['p80']:.4g}"
            row["tokens/s"] = tokens / t["median"]
            row["speed beside bf16"] = statistics.median(pairs)
            rows.append(row)
    return rows, {"losses": losses}


def decode(model, prompt, new):
    model.eval()
    return generate(model, [prompt], new)
