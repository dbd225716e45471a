"""What quantization does to a model: error and bits of each layer, perplexity before and after, a picture."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from minift.data.tokenizer import Tokenizer
from minift.load import fresh_folder, load_model, load_tokenizer, save_model, save_tokenizer
from minift.metrics.language_model import perplexity
from minift.models.disk import write_text
from minift.models.interface import LanguageModel
from minift.quant import Quantization, bnb, quantize_model
from minift.quant.model import QuantizationTable
from minift.reports.plots import plot_quantization
from minift.reports.probe import read_text

WINDOW = 512  # tokens that a prediction can look back on
TOKENS = 8192  # of the text that are read


def quantize(
    source: str,
    recipe: Quantization,
    dtype: str = "bfloat16",
    output: str = "",
    report: str = "",
    text: str = "",
) -> QuantizationTable:
    """`minift quantize`: print the table; write the 4-bit checkpoint to `output`, the report to `report`."""
    if output and recipe.format not in bnb.STORABLE:
        raise ValueError(
            f"a 4-bit checkpoint holds {' or '.join(bnb.STORABLE)}, not {recipe.format}; leave out --output"
        )
    folder = fresh_folder(output) if output else None
    if not report:
        model = load_model(source, dtype, quantize=recipe)
        print(model.quantization_table)
    else:
        tokenizer, sample = load_tokenizer(source), read_text(text)
        model = load_model(source, dtype)
        if model.head_kind != "causal_lm":
            raise ValueError(
                f"a report has a causal language model's perplexity, and {source} is {model.architecture}; "
                "leave out --report"
            )
        before = text_nats(model, tokenizer, sample)
        quantize_model(model, **asdict(recipe))
        after = text_nats(model, tokenizer, sample)
        _write(Path(report), model.quantization_table, recipe, before, after, text)
    if output:
        save_model(model, folder)
        save_tokenizer(load_tokenizer(source), folder)
        print(f"{output} holds the model as a bitsandbytes 4-bit checkpoint, and its tokenizer")
        if any(row.width % recipe.block_size for row in model.quantization_table):
            print(
                "some rows are not whole blocks; bitsandbytes 0.50 on AVX-512 CPUs reads such layers wrongly"
            )
    return model.quantization_table


def _write(folder: Path, table: QuantizationTable, recipe, before, after, text) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    nats, tokens = before
    line = (
        f"perplexity on {tokens:,} tokens of {text or 'the Python language reference'}: "
        f"{perplexity(nats, tokens):.3f} -> {perplexity(*after):.3f}"
    )
    print(f"{table}\n{line}")
    result = {
        "quantization": asdict(recipe),
        "tokens": tokens,
        "nats_per_token": {"before": nats / tokens, "after": after[0] / tokens},
        "perplexity": {"before": perplexity(nats, tokens), "after": perplexity(*after)},
        "layers": [{**asdict(row), "bits": row.bits} for row in table],
    }
    write_text(folder / "quantization.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "quantization.txt", f"{table}\n{line}\n")
    drawn = plot_quantization([asdict(row) for row in table], folder / "quantization.png")
    picture = "quantization.png and " if drawn else ""
    print(f"{picture}quantization.json, quantization.txt: {folder.resolve()}")


def text_nats(
    model: LanguageModel, tokenizer: Tokenizer, text: str, tokens: int = TOKENS
) -> tuple[float, int]:
    """(sum of nats, predicted tokens) of the text's first tokens, in windows of their own.

    A window's first token is not predicted. A token is taken to be 16 characters at most.
    """
    ids = tokenizer.encode(text[: 16 * tokens])[:tokens]
    window = min(WINDOW, model.dims.context)
    if len(ids) < 2:
        raise ValueError(f"the text is {len(ids)} token long; perplexity needs two")
    nats, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, window):
            part = torch.tensor([ids[start : start + window]], device=model.device)
            if part.shape[1] < 2:
                break
            logits = model(part)[0, :-1].float()
            nats += F.cross_entropy(logits, part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
    return nats, count
