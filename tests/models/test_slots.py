"""Virtual tokens: padding, pieces, positions and mixed rows against attention written out for one text."""

import copy
from itertools import accumulate, pairwise
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import survives
from slot_reference import FP64, expected, prefix_slot, prompt_slot, slotted

from minift.data.collate import Example, collate
from minift.models import interface, slots
from minift.models.generate import generate
from minift.training.objective import Objective


def padded(texts, side):
    """ids and mask (B, T) of texts padded on a side."""
    T = max(map(len, texts))
    ids, mask = torch.full((len(texts), T), 7), torch.zeros(len(texts), T, dtype=torch.long)
    for row, text in enumerate(texts):
        at = slice(T - len(text), T) if side == "left" else slice(0, len(text))
        ids[row, at], mask[row, at] = torch.tensor(text), 1
    return ids, mask


def read(model, ids, mask=None, pieces=None, position_ids=None, prefix_kv=None):
    """Logits (B, T, V), in one piece without a cache or in pieces of these lengths with one."""
    if pieces is None:
        return model(ids, attention_mask=mask, position_ids=position_ids, prefix_kv=prefix_kv)
    cache, got = model.new_cache(len(ids), ids.shape[1] + 9), []
    for a, b in pairwise(accumulate(pieces, initial=0)):
        part = None if position_ids is None else position_ids[:, a:b]
        seen = None if mask is None else mask[:, :b]
        got.append(model(ids[:, a:b], None, seen, part, None if a else prefix_kv, cache))
    return torch.cat(got, dim=1)


TEXTS = [[5, 9, 11, 30, 2], [8, 61, 3], [77, 1, 12, 50, 4, 19]]
SOME, OTHERS = torch.tensor([True, False, True]), torch.tensor([False, True, True])
SLOTS = {
    "prompt": lambda: [prompt_slot(3)],
    "prefix": lambda: [prefix_slot(2)],
    "prefix and prompt": lambda: [prompt_slot(3), prefix_slot(2)],
    "two prompts": lambda: [prompt_slot(3), prompt_slot(1, seed=3)],
    "two prefixes": lambda: [prefix_slot(3), prefix_slot(2, seed=3)],
    "mixed rows": lambda: [
        prompt_slot(3, rows=SOME),
        prefix_slot(2, rows=OTHERS),
        prefix_slot(1, seed=4, rows=SOME),
        prompt_slot(1, seed=5),
    ],
}


def agree(model, cases, explicit=None):
    """Each (side, pieces, shifted positions or not) gives the logits of attention written out."""
    kv = None if explicit is None else [tuple(pair[:, None]) for pair in explicit.unflatten(0, (2, 2))]
    want = {}
    for row, text in enumerate(TEXTS):
        want[row, False] = expected(model, text, row, explicit)
        want[row, True] = expected(model, text, row, explicit, [4 + i for i in range(len(text))])
    for side, pieces, shifted in cases:
        ids, mask = padded([text[:3] for text in TEXTS] if side == "none" else TEXTS, side)
        at = (mask.cumsum(dim=1) - 1).clamp(min=0) + 4 if shifted else None
        got = read(model, ids, None if side == "none" else mask, pieces, at, kv)
        assert got.shape == (*ids.shape, 97)
        for row, real in enumerate(mask.bool()):
            exact = want[row, shifted][: real.sum()]
            assert (got[row, real] - exact).abs().max() <= FP64 * exact.abs().max()


CASES = [
    *[(side, None, shifted) for side in ("none", "left", "right") for shifted in (False, True)],
    *[("none", (1, 2), False), ("left", (2, 1, 3), False), ("none", (1, 1, 1), True), ("left", (4, 2), True)],
]


@torch.no_grad()
def check(module):
    """Every kind of slots, padding, pieces and positions equals attention written out."""
    with patch.object(interface, "with_virtual_tokens", module.with_virtual_tokens):
        for made in SLOTS.values():
            agree(slotted(*made()), CASES)
        explicit = prefix_slot(2, seed=8).double().given
        for model in (slotted(), slotted(prefix_slot(2), prompt_slot(3, rows=SOME))):
            agree(model, CASES, explicit)


def test_virtual_tokens_equal_attention_written_out():
    check(slots)


@pytest.mark.parametrize(
    "old, new",
    [
        ("position_ids + virtual.sum(dim=1, keepdim=True)", "position_ids + virtual.shape[1]"),
        ("position_ids + virtual.sum(dim=1, keepdim=True)", "position_ids"),
        (".clamp(min=0)[:, prefix:]", ".clamp(min=0)[:, : x.shape[1] - T]"),
        ("torch.cat([*prompts, x], dim=1), joined", "torch.cat([*prompts[::-1], x], dim=1), joined"),
        ("cache.virtual = virtual", "cache.virtual = None"),
        ("virtual = cache.virtual if past else None", "virtual = None"),
        ("torch.cat((virtual, text.bool()), dim=1)", "torch.cat((virtual | True, text.bool()), dim=1)"),
        ("torch.cat((virtual, text.bool()), dim=1)", "torch.cat((virtual, text.bool() | True), dim=1)"),
        ("if slot.rows is None else slot.rows\n", "if slot.rows is None else ~slot.rows\n"),
        ("prefixes.append(found)", "prefixes.insert(0, found)"),
        ("for tensors in zip(*parts, strict=True)", "for tensors in [*zip(*parts)][::-1]"),
        ("if not past:\n        x, prefix_kv", "if True:\n        x, prefix_kv"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, slots, old, new)


def test_a_prompt_is_feeding_its_embeddings_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model, ids = slotted(prompt_slot(4), dtype=dtype), torch.tensor(TEXTS[:1])
        fed = torch.cat((model.slots[0].given[None], model.embed(ids)), dim=1)
        got = model.backbone(ids)
        model.slots[0].active = False
        assert torch.equal(got, model.backbone(inputs_embeds=fed)[:, 4:])


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from([torch.float32, torch.float64]))
def test_the_cache_of_a_text_is_a_prefix_for_what_follows(P, T, dtype):
    model = tiny_llama(dtype)
    ids = torch.randint(97, (2, P + T), generator=torch.Generator().manual_seed(P * 7 + T))
    cache = model.new_cache(2, P)
    with torch.no_grad():
        model(ids[:, :P], cache=cache)
        kv = list(zip(cache.keys, cache.values, strict=True))
        want, got = model(ids)[:, P:], model(ids[:, P:], prefix_kv=kv)
    # 2 blocks of 7 products of at most 97 terms in a row, against the largest logit, as for FP64
    limit = FP64 if dtype == torch.float64 else FP64 * 2.0**29
    assert (got - want).abs().max() <= limit * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_prefix_of_no_tokens_is_the_base_to_the_bit(dtype):
    ids, mask = padded(TEXTS, "left")
    base, nothing = tiny_llama(dtype), [(torch.zeros(1, 2, 0, 8),) * 2] * 2
    model = slotted(prefix_slot(0), prompt_slot(0), dtype=dtype)
    for m in (None, mask):
        want = base(ids, attention_mask=m)
        assert torch.equal(base(ids, attention_mask=m, prefix_kv=nothing), want)
        assert torch.equal(model(ids, attention_mask=m), want)
    with torch.no_grad():
        assert torch.equal(read(model, ids, mask, (2, 3, 1)), read(base, ids, mask, (2, 3, 1)))


def test_slots_that_are_off_are_the_base_to_the_bit():
    model, (ids, mask) = slotted(prefix_slot(2), prompt_slot(3), dtype=torch.float32), padded(TEXTS, "left")
    assert not torch.equal(model(ids, attention_mask=mask), tiny_llama()(ids, attention_mask=mask))
    for slot in model.slots:
        slot.active = False
    assert torch.equal(model(ids, attention_mask=mask), tiny_llama()(ids, attention_mask=mask))
    assert model.virtual_tokens == 0 and model.new_cache(1, 5).capacity == 5


texts = st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=4)
@given(texts, st.sampled_from(["prompt", "prefix", "prefix and prompt", "two prompts"]))
def test_greedy_tokens_do_not_depend_on_cache_batch_or_pieces(prompts, made):
    model = slotted(*SLOTS[made](), dtype=torch.float32, max_position_embeddings=128)
    together = generate(model, prompts, 64)
    assert together == generate(model, prompts, 64, use_cache=False)
    for prompt, tokens in zip(prompts, together, strict=True):
        assert len(tokens) == 64 and greedy(model, prompt, 64) == tokens


@torch.no_grad()
def greedy(model, prompt, n):
    """Greedy tokens of one text, which the cache takes in token by token."""
    cache, new = model.new_cache(1, len(prompt) + n), []
    for token in prompt:
        logits = model(torch.tensor([[token]]), cache=cache)
    for _ in range(n):
        new.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([[new[-1]]]), cache=cache)
    return new


@settings(max_examples=4)
@given(st.lists(st.lists(st.integers(2, 96), min_size=1, max_size=6), min_size=3, max_size=3))
def test_greedy_tokens_of_mixed_rows_are_those_of_each_alone(prompts):
    model = slotted(*SLOTS["mixed rows"](), dtype=torch.float32)
    together = generate(model, prompts, 20)
    assert together == generate(model, prompts, 20, use_cache=False)
    for row, prompt in enumerate(prompts):
        alone = copy.deepcopy(model)
        for slot in alone.slots:
            slot.active, slot.rows = slot.rows is None or bool(slot.rows[row]), None
        assert generate(alone, [prompt], 20) == [together[row]]


@pytest.mark.parametrize("made", ["prompt", "prefix", "mixed rows"])
def test_gradient_checkpointing_keeps_the_gradients_to_the_bit(made):
    ids, mask = padded(TEXTS, "right")
    found = []
    for recompute in (False, True):
        model = slotted(*SLOTS[made](), dtype=torch.float32)
        model.gradient_checkpointing = recompute
        model(ids, attention_mask=mask).square().mean().backward()
        found.append([slot.given.grad for slot in model.slots])
    for a, b in zip(*found, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b)


@pytest.mark.parametrize("made", SLOTS)
def test_gradients_equal_those_of_attention_written_out(made):
    model, (ids, mask) = slotted(*SLOTS[made]()), padded(TEXTS, "left")
    weights = torch.randn(*ids.shape, 97, dtype=torch.float64) * mask[..., None]
    parameters = list(model.slots.parameters())
    got = torch.autograd.grad((read(model, ids, mask) * weights).sum(), parameters)
    exact = torch.cat([expected(model, text, row) for row, text in enumerate(TEXTS)])
    want = torch.autograd.grad((exact * weights[mask.bool()]).sum(), parameters)
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= FP64 * b.abs().max()


def test_the_loss_is_of_the_text_alone():
    model = slotted(prefix_slot(2), prompt_slot(3))
    examples = [Example(text, 2, "") for text in TEXTS]
    loss, tokens = Objective(model)(collate(examples, 0))
    want = sum(F.cross_entropy(expected(model, t)[1:-1], torch.tensor(t[2:]), reduction="sum") for t in TEXTS)
    assert tokens == sum(len(text) - 2 for text in TEXTS) and abs(loss - want) <= FP64 * want


def test_a_cache_that_failed_or_was_emptied_starts_again():
    model, ids = slotted(prompt_slot(3)), torch.tensor(TEXTS[:1])
    small = model.make_cache(1, 7)
    for _ in range(2):
        with pytest.raises(ValueError, match="the KV cache holds 7 tokens and 8 were given"):
            model(ids, attention_mask=torch.ones(1, 5), cache=small)
    cache = model.new_cache(1, 5)
    with torch.no_grad():
        first = model(ids, cache=cache)
        model.slots[0].active, cache.length = False, 0
        assert torch.equal(model(ids, cache=cache), model(ids)) and not torch.equal(model(ids), first)


def test_room_is_that_of_the_text_with_most_virtual_tokens():
    model = slotted(*SLOTS["mixed rows"](), dtype=torch.float32)
    assert model.virtual_tokens == 3 + 1 + 1 + 2  # the last text sees all four slots
    model.slots[1].rows = torch.tensor([False, True, False])
    assert model.virtual_tokens == 5 and model.new_cache(3, 10).capacity == 17
    assert len(generate(model, TEXTS, 53)[0]) == 53
    with pytest.raises(
        ValueError, match="of 6 tokens, 54 new ones and 5 virtual ones exceed .* context of 64"
    ):
        generate(model, TEXTS, 54)


def test_trainable_state_loads_back_and_anything_else_is_refused():
    one, other = prompt_slot(3, seed=1), prompt_slot(3, seed=9)
    other.load(one.trainable_state())
    assert torch.equal(one.given, other.given) and other.given.requires_grad
    assert one.state()["given"] is one.given
    with pytest.raises(ValueError, match=r"held in \['given'\], and \['prompt_embeddings'\] were given"):
        one.load({"prompt_embeddings": one.given})
    with pytest.raises(ValueError, match=r"given of the virtual tokens has shape \(3, 32\), and \(2, 32\)"):
        one.load({"given": torch.zeros(2, 32)})


@pytest.mark.parametrize(
    "words, message",
    [
        ({"prefix_kv": [(torch.zeros(1, 2, 3, 8),) * 2]}, r"for 1 blocks; .* of the 2 blocks"),
        ({"prefix_kv": [(torch.zeros(3, 2, 3, 8),) * 2] * 2}, r"\(3, 2, 3, 8\).* \(2 or 1, 2, P, 8\)"),
        ({"prefix_kv": [(torch.zeros(1, 4, 3, 8),) * 2] * 2}, r"\(1, 4, 3, 8\).* \(2 or 1, 2, P, 8\)"),
        ({"prefix_kv": [(torch.zeros(1, 2, n, 8),) * 2 for n in (2, 3)]}, "of one shape"),
        ({"prefix_kv": []}, "for 0 blocks"),
        ({"attention_mask": torch.ones(2, 7)}, r"shape \(2, 7\).* holds 0 tokens of each and 4 are new"),
    ],
)
def test_what_does_not_fit_is_one_sentence(words, message):
    model = slotted(prompt_slot(3), dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        model(torch.zeros(2, 4, dtype=torch.long), **words)


def test_what_comes_too_late_or_for_another_batch_is_one_sentence():
    model, ids = slotted(prompt_slot(3), dtype=torch.float32), torch.zeros(2, 2, dtype=torch.long)
    cache, kv = model.new_cache(2, 9), [(torch.zeros(1, 2, 1, 8),) * 2] * 2
    with torch.no_grad():
        model(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 5 tokens already; give it with the first piece"):
        model(ids, prefix_kv=kv, cache=cache)
    with pytest.raises(ValueError, match=r"shape \(2, 7\).* holds 2 tokens of each and 2 are new.* \(2, 4\)"):
        model(ids, attention_mask=torch.ones(2, 7), cache=cache)
    model.slots[0].rows = SOME
    with pytest.raises(ValueError, match="chosen for 3 texts, and the batch holds 2"):
        model(ids)
