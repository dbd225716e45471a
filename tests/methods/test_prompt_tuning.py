"""Prompt tuning: where it starts, what it counts, and that a start is the text that it is taken from."""

import copy
import json
from dataclasses import asdict
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_config, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.config import build
from minift.methods import prompt_tuning
from minift.methods.base import trainable
from minift.methods.prompt_tuning import PromptTuning
from minift.models.generate import generate
from minift.models.llama import Llama
from minift.models.randomness import generator
from minift.training.evaluation import encode
from minift.training.settings import TrainConfig

IDS = torch.arange(20).view(2, 10) % 97
LLAMA_3_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}


def prompted(method, dtype=torch.float32, seed=0, **config):
    model = tiny_llama(dtype, **config)
    minift.apply(model, method, seed=seed)
    return model, model.slots[0].prompt_embeddings


def check(module):
    """Starts, the forward and the count, from the definitions."""
    base, seed = tiny_llama(), 3
    for n, ids in ((5, (7, 8, 9)), (2, (7, 8, 9)), (3, (7, 8, 9)), (1, (96,))):
        method = module.PromptTuning(num_virtual_tokens=n, init="text", init_ids=ids)
        model, P = prompted(method)
        want = base.embed.weight[[ids[i % len(ids)] for i in range(n)]]
        assert P.shape == (n, 32) and torch.equal(P, want)
        text = torch.tensor([ids[i % len(ids)] for i in range(n)]).expand(2, n)
        assert torch.equal(model.backbone(IDS), base.backbone(torch.cat((text, IDS), dim=1))[:, n:])
        plan = model.adapters["default"].plan
        assert method.count(plan) == plan.trainable == plan.added == n * 32 == P.numel()
        assert plan.sites[0].formula == f"{n} x 32"
    drawn, again = (prompted(module.PromptTuning(num_virtual_tokens=9), seed=s)[1] for s in (seed, seed + 1))
    picked = torch.randint(97, (9,), generator=generator(seed, "default:prompt"))
    assert torch.equal(drawn, base.embed.weight[picked]) and not torch.equal(drawn, again)
    P = prompted(module.PromptTuning(num_virtual_tokens=63, init="random"))[1]
    # the std of 63 * 32 draws is within 5 of its own standard errors, 1 / sqrt(2 * 63 * 32)
    assert abs(P.std() / base.embed.weight.std() - 1) < 5 / (2 * 63 * 32) ** 0.5
    assert abs(P.mean()) < 5 * base.embed.weight.std() / (63 * 32) ** 0.5


def test_starts_forward_and_count_are_the_definitions():
    check(prompt_tuning)


@pytest.mark.parametrize(
    "old, new",
    [
        ("islice(cycle(self.init_ids), n)", "islice(cycle(sorted(self.init_ids)[::-1]), n)"),
        ("islice(cycle(self.init_ids), n)", "islice(cycle(self.init_ids), 1, n + 1)"),
        ("torch.randint(model.dims.vocab,", "torch.randint(model.dims.vocab // 2,"),
        ("* model.embed_weight.std().item()", ""),
        ("* model.embed_weight.std().item()", "* model.embed_weight.var().item()"),
        ("torch.randn(n, model.dims.hidden, generator=random)", "torch.rand(n, model.dims.hidden)"),
        ("return n * D\n", "return n * (D + 1)\n"),
        ('RULE, (n, D), n * D, f"{n} x {D}"', 'RULE, (n, D), n + D, f"{n} x {D}"'),
        ("        return self.prompt_embeddings\n", "        return self.prompt_embeddings.flip(0)\n"),
        ("return model.embed(ids[None].to(model.device))[0]", "return model.head.weight[ids]"),
        ('generator(seed, f"{name}:prompt")', 'generator(0, f"{name}:prompt")'),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, prompt_tuning, old, new)


@given(
    st.lists(st.integers(0, 96), min_size=1, max_size=5),
    st.lists(st.integers(0, 96), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_start_from_text_is_that_text_before_every_other_to_the_bit(ids, text, dtype):
    model, P = prompted(PromptTuning(num_virtual_tokens=len(ids), init="text", init_ids=tuple(ids)), dtype)
    assert P.dtype == torch.float32
    want = tiny_llama(dtype).backbone(torch.tensor([ids + text]))[:, len(ids) :]
    assert torch.equal(model.backbone(torch.tensor([text])), want)  # the head meets other shapes


def test_a_resident_adapter_on_the_embedding_is_part_of_the_start():
    model = tiny_llama()
    minift.apply(model, minift.LoRA(r=2, target_modules=["embed_tokens"]), name="rows")
    torch.nn.init.normal_(model.model.embed_tokens.lora_embedding_A)
    minift.apply(model, PromptTuning(num_virtual_tokens=1, init="text", init_ids=(5,)), name="soft")
    assert torch.equal(model.slots[0].prompt_embeddings, model.embed(torch.tensor([5])))
    assert not torch.equal(model.embed(torch.tensor([5])), model.embed_weight[5:6])


def test_only_the_prompt_trains_in_fp32_and_a_step_moves_it():
    for dtype in (torch.float32, torch.bfloat16):
        model, P = prompted(PromptTuning(num_virtual_tokens=4), dtype)
        assert list(trainable(model)) == ["slots.0.prompt_embeddings"] and P.dtype == torch.float32
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(IDS).float().square().mean().backward()
        torch.optim.AdamW(model.parameters(), lr=0.01).step()
        moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
        assert moved == ["slots.0.prompt_embeddings"]


def test_it_runs_on_quantized_bases():
    for form in ("nf4", "int8"):
        model = tiny_llama()
        minift.quantize_model(model, form)
        base = copy.deepcopy(model)
        minift.apply(model, PromptTuning(num_virtual_tokens=3, init="text", init_ids=(4, 5, 6)))
        text = torch.cat((torch.tensor([[4, 5, 6]]).expand(2, 3), IDS), dim=1)
        assert torch.equal(model.backbone(IDS), base.backbone(text)[:, 3:])
        model(IDS).square().mean().backward()
        assert model.slots[0].prompt_embeddings.grad.abs().max() > 0


def test_switched_off_or_removed_it_is_the_base_to_the_bit():
    model, base = prompted(PromptTuning(num_virtual_tokens=4))[0], tiny_llama()
    assert not torch.equal(model(IDS), base(IDS))
    with model.adapters.disable():
        assert torch.equal(model(IDS), base(IDS))
    model.adapters.remove("default")
    assert torch.equal(model(IDS), base(IDS)) and not model.slots and not trainable(model)


def test_a_batch_may_mix_prompts_prefixes_branches_and_the_base():
    model, prompts = tiny_llama(), [[5, 9, 11], [7], [30, 2], [3, 4, 5, 6]]
    minift.apply(model, PromptTuning(num_virtual_tokens=4), name="soft")
    minift.apply(model, minift.PrefixTuning(num_virtual_tokens=2), name="prefix")
    torch.nn.init.normal_(model.slots[1].prompt_embeddings)
    minift.apply(model, minift.LoRA(r=2), name="branch")
    for layer in model.adapters["branch"].modules.values():
        torch.nn.init.normal_(layer.lora_B)
    names = ["soft", None, ("prefix", "branch"), ("soft", "prefix")]
    with model.adapters.rows(names):
        together = generate(model, prompts, 12)
        assert together == generate(model, prompts, 12, use_cache=False)
    for chosen, prompt, tokens in zip(names, prompts, together, strict=True):
        model.adapters.switch(*([chosen] if isinstance(chosen, str) else chosen or ()))
        assert generate(model, [prompt], 12) == [tokens]


def test_the_start_depends_on_seed_and_name_alone_and_draws_nothing_else():
    state = torch.get_rng_state()
    a, b = tiny_llama(seed=0), tiny_llama(seed=0)
    torch.set_rng_state(state)
    minift.apply(a, PromptTuning(), name="x", seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    minift.apply(b, PromptTuning(num_virtual_tokens=2), name="first", seed=5)
    minift.apply(b, PromptTuning(), name="x", seed=5)
    assert torch.equal(a.slots[0].prompt_embeddings, b.slots[1].prompt_embeddings)
    minift.apply(b, PromptTuning(), name="y", seed=5)
    assert not torch.equal(b.slots[1].prompt_embeddings, b.slots[2].prompt_embeddings)


def test_the_count_of_llama_3_8b_on_the_meta_device():
    with torch.device("meta"):
        model = Llama(tiny_config(**LLAMA_3_8B))
    plan = minift.apply(model, PromptTuning(num_virtual_tokens=20))
    assert plan.trainable == 81_920 == model.slots[0].prompt_embeddings.numel()
    assert model.slots[0].prompt_embeddings.is_meta
    row = str(plan).splitlines()[1].split()
    assert row[:3] == ["prompt", "virtual", "tokens"] and row[-2:] == ["float32", "81,920"]


def test_text_becomes_ids_with_the_tokenizer_and_the_fields_survive_json(tokenizer):
    method = PromptTuning(num_virtual_tokens=3, init="text", init_text="Sum up:")
    with pytest.raises(ValueError, match=r"init_text has no token ids yet; apply method.with_tokenizer"):
        minift.apply(tiny_llama(), method)
    ready = method.with_tokenizer(tokenizer)
    assert ready.init_ids == tuple(tokenizer.encode("Sum up:")) and method.init_ids == ()
    fields = json.loads(json.dumps(asdict(ready)))
    assert build(PromptTuning, fields, "method.") == ready
    assert PromptTuning().with_tokenizer(tokenizer) == PromptTuning()


def test_it_is_held_to_the_context(tokenizer):
    model = prompted(PromptTuning(num_virtual_tokens=10))[0]
    assert len(generate(model, [[5] * 50], 4)[0]) == 4
    with pytest.raises(
        ValueError, match="of 50 tokens, 5 new ones and 10 virtual ones exceed .* context of 64"
    ):
        generate(model, [[5] * 50], 5)
    rows = [{"prompt": "ab", "completion": "c"}]
    assert encode(model, tokenizer, rows, TrainConfig(max_length=54))
    with pytest.raises(ValueError, match="max_length 55 and 10 virtual tokens are above .* context of 64"):
        encode(model, tokenizer, rows, TrainConfig(max_length=55))
    with pytest.raises(ValueError, match="is 54 beside 10 of other adapters, .* use at most 53"):
        minift.apply(model, PromptTuning(num_virtual_tokens=54), name="second")


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="prompt_tuning cannot be merged: virtual tokens stand before"):
        minift.merge(prompted(PromptTuning())[0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it is a whole number of at least 1"),
        ({"num_virtual_tokens": 2.0}, "num_virtual_tokens is 2.0"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
        ({"init": "words"}, "init is 'words'; it is one of vocab, text, random"),
        ({"init_text": "Hi"}, "init_text is given and init is 'vocab'; say init = 'text'"),
        ({"init_ids": (1,), "init": "random"}, "init_ids is given and init is 'random'"),
        ({"init": "text"}, "init is 'text' and init_text is empty"),
    ],
)
def test_wrong_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptTuning(**fields)


def test_what_does_not_fit_the_model_is_refused_and_touches_nothing(tokenizer):
    model = tiny_llama()
    for method, message in (
        (PromptTuning(num_virtual_tokens=64), "is 64, and the model's context is 64.* use at most 63"),
        (PromptTuning(init="text", init_ids=(3, 97)), "init_ids hold 97, the vocabulary is 0 to 96"),
        (PromptTuning(init="text", init_ids=(-1,)), "init_ids hold -1"),
    ):
        with pytest.raises(ValueError, match=message):
            minift.apply(model, method)
        assert not model.adapters and not model.slots and all(p.requires_grad for p in model.parameters())
    with patch.object(type(tokenizer), "encode", lambda *_: []), pytest.raises(ValueError, match="no tokens"):
        PromptTuning(init="text", init_text=" ").with_tokenizer(tokenizer)
