"""`minift verify`: one adapter through several routes, and the largest difference of their logits.

Routes: our wrappers; our merge, in fp32; PEFT on transformers, where both are installed. Beside them stands
how far the adapter moves the base's logits: an adapter that was not applied moves nothing.
"""

import copy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from minift.load import load_model, load_tokenizer, save_model
from minift.methods import merge
from minift.methods.files import CONFIG, load_adapter, trained_head
from minift.models.interface import LanguageModel
from minift.models.json_file import read_json
from minift.models.safetensors_file import read_tensors, write_safetensors
from minift.quant import Quantization
from minift.reports.probe import logits, probe

PROBE = 64  # tokens
ROUNDING = 2e-5  # of the largest logit: what two correct programs in fp32 may differ by
CLOSE = 1e-3  # of it, where the adapter moves the logits by a hundred times more


def verify(
    folder: str,
    source: str = "",
    text: str = "",
    check_base: bool = True,
    quantize: Quantization | None = None,
    dtype: str = "float32",
) -> dict[str, float]:
    """Print and return route -> largest difference from our own logits; a large one is an error.

    A base that was quantized while it was loaded needs the same `quantize` and `dtype` again.
    """
    config = read_json(Path(folder) / CONFIG)
    source = source or config.get("base_model_name_or_path")
    if not source or not isinstance(source, str):
        raise ValueError(f"{folder} does not name its base; give it as --model")
    model = load_model(source, dtype, quantize=quantize, **trained_head(folder))
    ids = probe(model, load_tokenizer(source), text, min(PROBE, model.dims.context // 2))
    base = copy.deepcopy(model)
    load_adapter(model, folder, check_base=check_base)
    [adapter] = model.adapters.values()
    ours, plain = logits(model, ids), logits(base, ids)
    moved = (ours - plain).abs().max().item()
    print(f"{adapter.method.name}: {adapter.plan.totals()}")
    print(f"largest logit {ours.abs().max().item():.4g}; the adapter moves the base's by up to {moved:.4g}")
    if moved == 0:
        print("this adapter changes nothing: it was not trained, or its last factor is zero")
    found = {}
    if adapter.method.unmergeable:
        print(f"merged: not possible, {adapter.method.unmergeable}")
    else:
        merged = copy.deepcopy(model)
        merge(merged)
        found["merged"] = (logits(merged, ids) - ours).abs().max().item()
    if find_spec("peft") is None or find_spec("transformers") is None:
        print("peft: not installed (pip install -c constraints.txt -e '.[parity]')")
    else:
        theirs = _through_peft(base, folder, ids)
        if theirs is not None:
            found["peft"] = (theirs - ours).abs().max().item()
    for route, difference in found.items():
        print(f"{route}: the logits of {ids.shape[1]} tokens differ by at most {difference:.3e}")
        largest = ours.abs().max().item()
        if not difference <= max(ROUNDING * largest, min(CLOSE * largest, 1e-2 * moved)):
            raise ValueError(
                f"{folder}: {route} and minift compute different models (logits differ by {difference:.3g})"
            )
    return found


AUTO = {  # head -> the class of transformers that loads it
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}
# A program of its own, so that minift imports no peer: class, base, adapter, file of inputs, file for logits.
PEFT = """
import sys, peft, torch, transformers
from safetensors.torch import load_file, save_file
auto, base, adapter, inputs, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(base, dtype=torch.float32)
model = peft.PeftModel.from_pretrained(model, adapter).eval()
inputs = load_file(inputs)
with torch.inference_mode():
    logits = model(**inputs).logits[0].float()  # (P + T, V) or (labels,)
if logits.ndim == 2:
    logits = logits[-inputs["input_ids"].shape[1]:]
save_file({"logits": logits.contiguous()}, out)
"""


def _through_peft(base: LanguageModel, folder: str, ids: torch.Tensor) -> torch.Tensor | None:
    """The base as a folder of transformers, the adapter on it by PEFT; virtual positions are left out."""
    if base.head_kind not in AUTO:
        print(f"peft: the head {base.head_kind} has no logits to compare")
        return None
    inputs = {"input_ids": ids}
    if base.head_kind == "seq2seq_lm":
        inputs["decoder_input_ids"] = base.shift_right(ids)
    with tempfile.TemporaryDirectory() as scratch:
        there = Path(scratch)
        save_model(base, there / "base")
        write_safetensors(there / "inputs", inputs, {})
        words = [AUTO[base.head_kind], there / "base", folder, there / "inputs", there / "logits"]
        done = subprocess.run(
            [sys.executable, "-c", PEFT, *map(str, words)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"peft: does not run this adapter on this base ({last})")
            return None
        return read_tensors(there / "logits")[0]["logits"]
