"""MiniLM itself: known token ids, hidden states, embeddings, similarities. Needs: minift fetch minilm."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import minift
from minift.fetch import ALIASES, cache_folder

GOLDEN = Path(__file__).parent.parent / "golden"
# The files hold six decimals. Two orders of summing in fp32 differ by about sqrt(n) roundings in a sum of n
# terms, n at most 1536 here; 24 such products follow each other (6 blocks), and no number below exceeds 1.
TOLERANCE = 0.5e-6 + (24 * 1536) ** 0.5 * 2.0**-24


def golden(name):
    return [json.loads(line) for line in (GOLDEN / name).read_text(encoding="utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def folder():
    path = cache_folder() / "minilm" / ALIASES["minilm"].model
    if not (path / "model.safetensors").exists():
        pytest.skip("needs MiniLM: minift fetch minilm")
    return path


@pytest.fixture(scope="module")
def minilm(folder):
    return minift.load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return minift.load_tokenizer(folder)


def embeddings(hidden, mask):
    """Mean over real tokens, L2-normalised: (B, T, D), (B, T) -> (B, D)."""
    mask = mask[..., None].float()
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.mark.parametrize("row", golden("minilm_encodings.jsonl"), ids=lambda r: repr(r["text"][:20]))
def test_known_token_ids(tokenizer, row):
    assert tokenizer.encode(row["text"], special_tokens=True) == row["ids"]


def test_a_long_text_is_neither_cut_nor_padded(tokenizer):
    """The file's own tokenizer.json asks for 128 tokens, no more and no fewer."""
    words = ["bread"] * 600
    assert len(tokenizer.encode(" ".join(words), special_tokens=True)) == 602
    assert len(tokenizer.encode("bread", special_tokens=True)) == 3


@pytest.mark.parametrize("side", ["left", "right"])
def test_known_hidden_states_and_embeddings_in_a_padded_batch(minilm, tokenizer, side):
    rows = golden("minilm_embeddings.jsonl")
    texts = [tokenizer.encode(row["text"], special_tokens=True) for row in rows]
    assert texts == [row["ids"] for row in rows]
    T = max(map(len, texts))
    ids, mask = torch.zeros(4, T, dtype=torch.long), torch.zeros(4, T, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(T - len(text), T) if side == "left" else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    with torch.no_grad():
        hidden = minilm(ids, attention_mask=mask)
    first = hidden[torch.arange(4), mask.argmax(-1)]
    found = embeddings(hidden, mask)

    def known(field):
        return torch.tensor([row[field] for row in rows])

    assert (first[:, :8] - known("cls_hidden_first8")).abs().max() < TOLERANCE
    assert (found[:, :8] - known("embedding_first8")).abs().max() < TOLERANCE
    assert (found @ found.T - known("cosine_to_all")).abs().max() < TOLERANCE


def test_it_is_a_bert_with_a_pooler_and_a_classifier_of_it_has_one_new_layer(minilm, folder):
    assert (minilm.architecture, minilm.head_kind) == ("BertModel", "none")
    assert sum(p.numel() for p in minilm.parameters()) == 22713216
    model = minift.load_model(folder, head="sequence_classification", num_labels=2)
    assert model.new_modules == ("classifier",)
    assert torch.equal(model.bert.pooler.dense.weight, minilm.bert.pooler.dense.weight)
