"""SmolLM2's greedy and beam continuations equal transformers', token for token in fp32.

Needs: minift fetch smollm2. Ours run in batches of mixed lengths and theirs one prompt at a time, so that
padding is under test as well. The prompts are functions of the standard library.
"""

import itertools

import pytest
import torch

import minift
from minift.data.stdlib_docstrings import pairs

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity
BATCH = 10


@pytest.fixture(scope="module")
def models(smollm2_path, tmp_path_factory):
    """Ours, the tokenizer, and the same weights as transformers loads what we save."""
    ours, tokenizer = minift.load_model(smollm2_path), minift.load_tokenizer(smollm2_path)
    folder = tmp_path_factory.mktemp("smollm2")
    minift.save_model(ours, folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return ours, tokenizer, peer


def some_prompts(tokenizer, n):
    """Evenly from all modules."""
    rows = pairs()
    return [tokenizer.encode(rows[i * len(rows) // n]["prompt"]) for i in range(n)]


def theirs(peer, prompt, new, ends, **keywords):
    ids = torch.tensor([prompt])
    out = peer.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=list(ends),
        pad_token_id=ends[0],
        **keywords,
    )
    return list(itertools.takewhile(lambda token: token not in ends, out[0, len(prompt) :].tolist()))


LENGTHS = [(5, 16), pytest.param(50, 64, marks=pytest.mark.slow)]


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 4}], ids=["greedy", "beams"])
@pytest.mark.parametrize("count, new", LENGTHS)
def test_continuations_agree_token_for_token(models, count, new, keywords):
    ours, tokenizer, peer = models
    prompts = some_prompts(tokenizer, count)
    for batch in (prompts[i : i + BATCH] for i in range(0, count, BATCH)):
        made = minift.generate(ours, batch, new, tokenizer=tokenizer, **keywords)
        for prompt, tokens in zip(batch, made, strict=True):
            assert tokens == theirs(peer, prompt, new, tokenizer.eos_ids, **keywords)
