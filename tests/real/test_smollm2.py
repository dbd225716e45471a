"""SmolLM2 itself: known logits, perplexity, tokens; memory while loading. Needs: minift fetch smollm2."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minift
from minift.models.gguf_file import read_gguf

GOLDEN = Path(__file__).parent.parent / "golden"


def golden(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return minift.load_model(smollm2_path)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return minift.load_tokenizer(smollm2_path)


@pytest.mark.parametrize("row", golden("smollm2_logits.jsonl"), ids=lambda r: r["prompt"][:20])
def test_known_logits_losses_and_greedy_tokens(smollm2, tokenizer, row):
    """The file holds five decimals (losses) and four (logits); the model's fp32 sums differ by a few 1e-5."""
    assert tokenizer.encode(row["prompt"]) == row["ids"]
    ids = torch.tensor([row["ids"]])
    with torch.no_grad():
        logits = smollm2(ids)[0]
    losses = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    assert (losses - torch.tensor(row["token_nll"])).abs().max() < 2e-4
    assert losses.mean().item() == pytest.approx(row["mean_nll"], abs=2e-5)
    assert logits[-1].topk(5).indices.tolist() == row["last_top5_ids"]
    assert (logits[-1].topk(5).values - torch.tensor(row["last_top5_logits"])).abs().max() < 5e-4
    assert (logits[-1, :8] - torch.tensor(row["last_logits_first8"])).abs().max() < 5e-4
    assert minift.generate(smollm2, [row["ids"]], 16) == [row["greedy_16"]]
    assert tokenizer.decode(row["greedy_16"]) == row["greedy_16_text"]


def test_a_batch_of_mixed_lengths_gives_the_same_greedy_tokens(smollm2):
    rows = golden("smollm2_logits.jsonl")
    assert minift.generate(smollm2, [r["ids"] for r in rows], 16) == [r["greedy_16"] for r in rows]


def test_known_perplexities(smollm2, tokenizer, shared_data):
    for ref in json.loads((shared_data / "model_refs" / "smollm2_perplexity.json").read_text()):
        text = (shared_data / ref["file"]).read_text(encoding="utf-8")[:20000]
        n = ref["window_tokens"]
        ids = torch.tensor(tokenizer.encode(text)[: ref["windows"] * n]).view(-1, n)
        with torch.no_grad():
            logits = smollm2(ids)[:, :-1]
        nats = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)).item()
        assert nats == pytest.approx(ref["mean_nll"], abs=1e-5)
        assert math.exp(nats) == pytest.approx(ref["perplexity"], rel=1e-5)


def test_known_token_ids(tokenizer):
    for row in golden("smollm2_encodings.jsonl"):
        assert tokenizer.encode(row["text"]) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"], skip_special_tokens=False) == row["text"]


def test_known_chats(tokenizer):
    for row in golden("smollm2_chat.jsonl"):
        assert tokenizer.render_chat(row["messages"], row["add_generation_prompt"]) == row["rendered"]
        assert tokenizer.encode_chat(row["messages"], row["add_generation_prompt"]) == row["ids"]


def test_every_stored_tensor_is_known(smollm2_path, shared_data):
    table = (shared_data / "model_refs" / "smollm2_gguf_tensors.csv").read_text().split("\n")[1:]
    stored = {name: "x".join(map(str, reversed(t.shape))) for name, t in read_gguf(smollm2_path)[1].items()}
    assert stored == {line.split(",")[0]: line.split(",")[1] for line in table if line}


def test_the_line_of_totals_is_the_known_one(smollm2):
    plan = minift.LoRA(r=8, alpha=16, target_modules=["q_proj", "v_proj"]).plan(smollm2)
    assert plan.totals() == "trainable params: 460,800 || all params: 134,975,808 || trainable%: 0.3414"


PEAK = """
import sys, threading, time
import minift, minift.load, torch, gguf.quants
def private():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024
start, peak, done = private(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, private())
        time.sleep(0.002)
watcher = threading.Thread(target=watch); watcher.start()
model = minift.load_model(sys.argv[1], dtype=sys.argv[2], quantize=sys.argv[3] or None)
done = True; watcher.join()
size = sum(p.numel() * p.element_size() for p in model.parameters())
largest = 0 if not sys.argv[3] else max(
    {"bfloat16": 2, "float32": 4}[sys.argv[2]] * m.num_embeddings * m.embedding_dim
    for m in model.modules() if isinstance(m, torch.nn.Embedding))
print((peak - start) / (size + 2 * largest))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("quantize, limit", [("", 1.3), ("nf4", 1)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["gguf", "folder"])
def test_loading_needs_little_more_than_the_model(
    smollm2_path, smollm2, tmp_path, dtype, form, quantize, limit
):
    """As a multiple of the model; of the quantized one and 2 of its largest dense tensors, the embedding."""
    source = smollm2_path
    if form == "folder":
        source = tmp_path
        minift.save_model(smollm2, source)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(source), dtype, quantize], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= limit


def test_qlora_keeps_its_base_and_the_model_near_the_dense_one(smollm2_path, smollm2, tokenizer):
    from_disk = minift.load_model(smollm2_path, quantize="nf4")
    table = from_disk.quantization_table
    assert sum(row.elements for row in table) == 106_168_320 and len(table) == 210
    assert (
        sum(row.bytes_after for row in table) == 54_770_040
    )  # n/2 + n/64 + 4 n/(64 * 256) + 4, layer by layer
    assert 0.09 < table.relative < 0.1 and max(row.of_bound for row in table) <= 1
    plan = minift.QLoRA(r=8).plan(from_disk)
    assert plan.totals().startswith("trainable params: 2,442,240 || all params: 136,957,248 ||")
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris. The capital of Italy is")])
    with torch.inference_mode():
        dense, quantized = smollm2(ids)[0, -1], from_disk(ids)[0, -1]
    assert dense.argmax() == quantized.argmax()
