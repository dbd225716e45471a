"""Reading one token with a cache: the ops for it give what reading the whole text gives, adapters or not."""

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import minift
from minift.kernels import library, runtime
from minift.models.generate import generate
from minift.models.layers import Linear

SHAPES = {"head_dim": 16, "hidden_size": 64}  # heads that the C file takes
FAMILIES = [
    {},
    {"model_type": "mistral", "sliding_window": 3},
    {"model_type": "qwen2", "num_key_value_heads": 1},
    {"head_dim": 8},  # heads that it does not take
]

needs_c = pytest.mark.skipif(library.LIBRARY is None, reason=f"the C file is {library.WHY}")


def step_by_step(model, ids, mask, first):
    """Logits of tokens first..T, each read alone after those before it."""
    cache = model.new_cache(*ids.shape)
    model(ids[:, :first], attention_mask=mask[:, :first], cache=cache)
    steps = [
        model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache)
        for t in range(first, ids.shape[1])
    ]
    return torch.cat(steps, dim=1)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_token_by_token_gives_the_logits_of_the_whole_text(family, adapted):
    model = tiny_llama(**{**SHAPES, **FAMILIES[family]})
    if adapted:
        minift.apply(model, minift.LoRA(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, p in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
    ids, mask = torch.randint(0, 97, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[1, :2] = mask[2, :3] = 0  # padding on the left
    with torch.no_grad():
        whole, steps = model(ids, attention_mask=mask)[:, 4:], step_by_step(model, ids, mask, 4)
    # Two orders of the same fp32 sums: 2^-24 each, of logits of a few units through two blocks.
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-4)


@needs_c
def test_the_ops_are_the_ones_that_run(monkeypatch):
    model, calls = tiny_llama(torch.bfloat16, **SHAPES), []
    for op in ("linear", "rms_norm", "attend"):
        run = getattr(library, op)
        monkeypatch.setattr(library, op, lambda *args, op=op, run=run: calls.append(op) or run(*args))
    generate(model, [[1, 2, 3]], 3)
    blocks, steps = 2, 2  # the first token comes with the prompt
    assert calls.count("attend") == blocks * steps
    assert calls.count("linear") == (7 * blocks + 1) * (steps + 1)
    assert calls.count("rms_norm") == (2 * blocks + 1) * (steps + 1)
    calls.clear()
    with runtime.using("torch"):
        generate(model, [[1, 2, 3]], 3)
    model(torch.tensor([[1]]))  # records gradients
    assert not calls


prompts = st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=8), min_size=1, max_size=4)


@given(prompts, st.integers(1, 6))
def test_greedy_tokens_are_the_same_with_and_without_the_cache_and_in_any_batch_of_such_heads(prompts, n):
    model = tiny_llama(**SHAPES)
    together = generate(model, prompts, n)
    assert together == generate(model, prompts, n, use_cache=False)
    assert together == [generate(model, [p], n)[0] for p in prompts]


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_a_new_adapter_does_not_change_a_bit_of_few_rows(rows):
    model, ids = tiny_llama(torch.bfloat16, **SHAPES), torch.randint(0, 97, (1, rows))
    with torch.no_grad():
        before = model(ids)
        minift.apply(model, minift.LoRA(r=2, target_modules="all-linear"))
        assert torch.equal(model(ids), before)


def test_hooks_of_a_layer_run_on_few_rows_too():
    layer, seen = Linear(8, 4).bfloat16(), []
    layer.register_forward_hook(lambda *args: seen.append(args))
    with torch.no_grad():
        layer(torch.ones(1, 8, dtype=torch.bfloat16))
    assert len(seen) == 1


def test_a_full_cache_says_so():
    model = tiny_llama(**SHAPES)
    cache = model.new_cache(1, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="the KV cache holds 2 tokens and 3 were given"):
        for token in (1, 2, 3):
            model(torch.tensor([[token]]), cache=cache)
