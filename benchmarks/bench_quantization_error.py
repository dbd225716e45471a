"""What each format does to SmolLM2: bits per weight, relative error, perplexity. Needs: minift fetch smollm2.

Every linear layer but the head is quantized; the weights that can be fetched were stored in 5 bits (Q4_1), so
this is a second quantization. Perplexity: the first 8,192 tokens of the Python language reference that comes
with Python, windows of 512, bf16. Gate: no layer's largest error is above its proven bound.
"""

from benchmarks.harness import gate
from minift.load import load_model, load_tokenizer
from minift.metrics.language_model import perplexity
from minift.quant import FORMATS, quantize_model
from minift.reports.probe import read_text
from minift.reports.quantization import TOKENS, text_nats


def run(quick: bool) -> tuple[list[dict], dict]:
    tokenizer, text = load_tokenizer("smollm2"), read_text()
    tokens = 512 if quick else TOKENS
    recipes = [(f, b, d) for f in FORMATS for b in (64, 128) for d in (False, True)]
    rows = []
    for recipe in [None, *(recipes[:1] if quick else recipes)]:
        model = load_model("smollm2", "bfloat16")
        row = {"format": "dense bf16", "block": "-", "double quantization": "-", "bits": 16.0, "error": 0.0}
        if recipe:
            table = quantize_model(model, *recipe)
            gate(f"{recipe}", max(layer.of_bound for layer in table), 1)
            bits = 8 * sum(layer.bytes_after for layer in table) / sum(layer.elements for layer in table)
            row = dict(zip(row, (*recipe, bits, table.relative), strict=True))
        loss = perplexity(*text_nats(model, tokenizer, text, tokens))
        first = rows[0]["perplexity"] if rows else loss
        rows.append({**row, "perplexity": round(loss, 2), "times dense": loss / first})
    return rows, {"tokens": tokens}
