"""Greedy generation with SmolLM2-135M in bf16: minift beside transformers, 64 new tokens, batches of 1 and 8.

The sides take turns, whole texts at a time, in one process. Gates: in fp32 both give the same tokens; in
bf16, reading that text token by token with a cache, minift's logits are on average no further from those of
fp32 than 1.25 times transformers'.

The limit is reading the weights once a token: `of limit` is that time, at the bandwidth of a copy, to ours.
"""

import statistics
import tempfile
from functools import partial

import torch

import minift
from benchmarks.harness import alternate, gate, gate_equal, quantiles
from benchmarks.limits import DEVICE, copy_bandwidth
from minift.data.stdlib_docstrings import pairs

NEW, PROMPT, BATCHES = 64, 16, (1, 8)


def prompts(count: int) -> torch.Tensor:
    """The first tokens of functions from the standard library: (count, PROMPT)."""
    tokenizer = minift.load_tokenizer("smollm2")
    texts = (tokenizer.encode(row["prompt"])[:PROMPT] for row in pairs())
    whole = (ids for ids in texts if len(ids) == PROMPT)
    return torch.tensor([ids for ids, _ in zip(whole, range(count), strict=False)], device=DEVICE)


def load(folder: str, dtype: str) -> dict:
    """side -> model."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(DEVICE).eval()
    theirs.generation_config.eos_token_id = None  # every text has NEW tokens
    return {"minift": minift.load_model(folder, dtype=dtype).to(DEVICE), "transformers": theirs}


@torch.inference_mode()
def generate(side: str, model, ids: torch.Tensor) -> torch.Tensor:
    """ids (B, PROMPT) -> new tokens (B, NEW)."""
    if side == "minift":
        return torch.tensor(minift.generate(model, ids.tolist(), NEW))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    return out[:, PROMPT:].cpu()


@torch.inference_mode()
def step_by_step(side: str, model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the tokens after the prompt, each read alone: ids (B, T) -> (B, T - PROMPT, V)."""
    if side == "minift":
        read = partial(model, cache=model.new_cache(*ids.shape))
    else:
        from transformers import DynamicCache

        cache = DynamicCache()

        def read(part):
            return model(part, past_key_values=cache, use_cache=True).logits

    read(ids[:, :PROMPT])
    return torch.cat([read(ids[:, t : t + 1]) for t in range(PROMPT, ids.shape[1])], dim=1).float()


def run(quick: bool) -> tuple[list[dict], dict]:
    rows, ids = [], prompts(max(BATCHES))
    with tempfile.TemporaryDirectory() as folder:
        minift.save_model(minift.load_model("smollm2"), folder)
        wide, narrow = load(folder, "float32"), load(folder, "bfloat16")
    texts = {side: generate(side, model, ids) for side, model in wide.items()}
    gate_equal("greedy tokens in fp32", texts["minift"], texts["transformers"])
    whole = torch.cat((ids, texts["minift"].to(DEVICE)), dim=1)
    exact = step_by_step("transformers", wide["transformers"], whole)
    error = {s: (step_by_step(s, m, whole) - exact).abs().mean().item() for s, m in narrow.items()}
    gate("bf16 logits, mean error over transformers'", error["minift"] / error["transformers"], 1.25)
    limit = sum(p.numel() * p.element_size() for p in narrow["minift"].parameters()) / copy_bandwidth()
    del wide
    for B in BATCHES:
        calls = {side: partial(generate, side, model, ids[:B]) for side, model in narrow.items()}
        times = alternate(calls, repeats=3 if quick else 7, warmup=1)
        ratios = [b / a for a, b in zip(times["minift"], times["transformers"], strict=True)]
        for side, seconds in times.items():
            t = quantiles(seconds)
            row = {"batch": B, "side": side, "tokens/s": round(B * NEW / t["median"], 1)}
            row |= {
                "ms a token": 1e3 * t["median"] / NEW,
                "p20": 1e3 * t["p20"] / NEW,
                "p80": 1e3 * t["p80"] / NEW,
            }
            row["of limit"] = limit * NEW / t["median"]
            row["x transformers"] = round(statistics.median(ratios), 2) if side == "minift" else 1.0
            row["bf16 error"] = error[side]
            rows.append(row)
    return rows, {}
