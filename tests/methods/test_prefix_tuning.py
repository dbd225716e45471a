"""Prefix tuning: the order of its columns, the projection, its count; test_slots.py has the attention."""

import copy

import pytest
import torch
from conftest import tiny_config, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.methods import prefix_tuning
from minift.methods.base import trainable
from minift.methods.prefix_tuning import PrefixTuning
from minift.models.generate import generate
from minift.models.llama import Llama

IDS = torch.arange(20).view(2, 10) % 97
KINDS = [{}, {"prefix_projection": True}]


def prefixed(method, seed=0, dtype=torch.float32, **config):
    model = tiny_llama(dtype, **config)
    minift.apply(model, method, seed=seed)
    return model, model.slots[0]


def columns(tensors):
    """P (n, 2 L KV hd) of the parameters by name."""
    if "prompt_embeddings" in tensors:
        return tensors["prompt_embeddings"]
    h = tensors["embedding"] @ tensors["projection.0.weight"].T + tensors["projection.0.bias"]
    return h.tanh() @ tensors["projection.2.weight"].T + tensors["projection.2.bias"]


def pair(P, block, KV, hd):
    """Keys and values (KV, n, hd) of a block, read off the columns one number at a time."""
    kv = torch.empty(2, KV, len(P), hd, dtype=P.dtype)
    for which in range(2):
        for head in range(KV):
            for i in range(hd):
                kv[which, head, :, i] = P[:, ((2 * block + which) * KV + head) * hd + i]
    return kv


# Two layers of sums of at most 97 terms one after the other, each rounded to 2^-53: 2 * 97 * 2^-53 = 2.2e-14
FP64 = 1e-12


def check(module):
    """Keys, values, starts, the count and the plan, from the definitions."""
    for n, L, KV, fields in (
        (3, 2, 2, {}),
        (5, 3, 4, {}),
        (3, 2, 1, {"prefix_projection": True}),
        (4, 3, 2, {"prefix_projection": True, "encoder_hidden_size": 5}),
    ):
        method = module.PrefixTuning(num_virtual_tokens=n, **fields)
        model, slot = prefixed(method, seed=3, num_hidden_layers=L, num_key_value_heads=KV)
        width, H = KV * 8, fields.get("encoder_hidden_size", KV * 8)
        hand = n * L * 2 * width
        if fields:
            hand = n * width + (width * H + H) + (H * 2 * L * width + 2 * L * width)
        plan = model.adapters["default"].plan
        assert method.count(plan) == plan.trainable == plan.added == hand
        assert sum(p.numel() for p in trainable(model).values()) == hand
        tensors = slot.trainable_state()
        if not fields:  # within 5 standard errors of n 2 L KV hd draws
            P = tensors["prompt_embeddings"]
            assert abs(P.std() / 0.02 - 1) < 5 / (2 * P.numel()) ** 0.5
            assert abs(P.mean()) < 5 * 0.02 / P.numel() ** 0.5
        else:
            assert abs(tensors["embedding"].std() - 1) < 5 / (2 * n * width) ** 0.5
            assert 0.5 * H**-0.5 < tensors["projection.2.weight"].abs().max() <= H**-0.5
        P = columns({name: p.detach() for name, p in slot.double().named_parameters()})
        assert (slot.state()["prompt_embeddings"] - P).abs().max() <= FP64 * (1 + P.abs().max())
        assert len(slot.prefix_kv()) == L and slot.encoded == bool(fields)
        for block, kv in enumerate(slot.prefix_kv()):
            want = pair(P, block, KV, 8)
            assert kv[0].shape == kv[1].shape == (KV, n, 8)
            assert (torch.stack(kv) - want).abs().max() <= FP64 * (1 + P.abs().max())
            assert want.abs().max() > 0.01


def test_keys_values_starts_and_count_are_the_definitions():
    check(prefix_tuning)


@pytest.mark.parametrize(
    "old, new",
    [
        ("zip(kv[0::2], kv[1::2], strict=True)", "zip(kv[1::2], kv[0::2], strict=True)"),
        ("zip(kv[0::2], kv[1::2], strict=True)", "zip(*kv.chunk(2), strict=True)"),
        (".view(self.shape).permute(1, 2, 0, 3)", ".view(self.shape).permute(1, 2, 0, 3).flip(2)"),
        (".view(self.shape).permute(1, 2, 0, 3)", ".view(self.shape).permute(1, 2, 0, 3).flip(1)"),
        ("nn.Tanh()", "nn.ReLU()"),
        ("STD = 0.02", "STD = 1.0"),
        ("generator=random) * STD", "generator=random) * STD + STD"),
        ("return n * width\n", "return 2 * n * width\n"),
        ("return n * width + H * (width + 1) + columns", "return n * width + H * width + columns"),
        ("n * L * 2 * KV * hd, formula", "n * L * KV * hd, formula"),
        ('linear_site("prefix.projection.2", 2 * L * KV * hd, H)', 'linear_site("2", L * KV * hd, H)'),
        ("H = self.encoder_hidden_size or KV * hd", "H = KV * hd"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, prefix_tuning, old, new)


@given(st.integers(1, 6), st.sampled_from(KINDS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_it_is_a_prefix_given_by_hand_to_the_bit(n, fields, dtype):
    model, slot = prefixed(PrefixTuning(num_virtual_tokens=n, **fields), dtype=dtype)
    P = slot.state()["prompt_embeddings"].detach().to(dtype)
    kv = [tuple(pair(P, block, 2, 8)[:, None]) for block in range(2)]
    assert torch.equal(model(IDS), tiny_llama(dtype)(IDS, prefix_kv=kv))


@pytest.mark.parametrize("fields", KINDS, ids=["plain", "projected"])
def test_every_parameter_trains_on_any_base(fields):
    for base in ("float32", "bfloat16", "nf4", "int8"):
        quantized = base in ("nf4", "int8")
        model = tiny_llama(torch.float32 if quantized else getattr(torch, base))
        if quantized:
            minift.quantize_model(model, base)
        minift.apply(model, PrefixTuning(num_virtual_tokens=3, **fields))
        model(IDS).float().square().mean().backward()
        for name, p in trainable(model).items():
            assert p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("slots."))


@pytest.mark.parametrize("fields", KINDS, ids=["plain", "projected"])
def test_gradient_checkpointing_keeps_the_gradients_to_the_bit(fields):
    found = []
    for recompute in (False, True):
        model = prefixed(PrefixTuning(num_virtual_tokens=3, **fields))[0]
        model.gradient_checkpointing = recompute
        model(IDS).square().mean().backward()
        found.append([p.grad for p in trainable(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_a_projection_exports_is_the_same_model_without_it():
    model, slot = prefixed(PrefixTuning(num_virtual_tokens=4, prefix_projection=True))
    plain, held = prefixed(PrefixTuning(num_virtual_tokens=4))
    held.load(slot.state())
    assert torch.equal(model(IDS), plain(IDS))
    assert generate(model, [[5, 9], [7]], 8) == generate(plain, [[5, 9], [7]], 8)
    with pytest.raises(
        ValueError, match=r"\['prompt_embeddings'\] were given; an encoder cannot be had back"
    ):
        slot.load(slot.state())


@pytest.mark.parametrize("fields", KINDS, ids=["plain", "projected"])
def test_training_goes_on_from_the_trainable_state(fields):
    method = PrefixTuning(num_virtual_tokens=4, **fields)
    (model, slot), (other, empty) = prefixed(method, seed=1), prefixed(method, seed=2)
    assert not torch.equal(model(IDS), other(IDS))
    empty.load(slot.trainable_state())
    assert torch.equal(model(IDS), other(IDS)) and all(p.requires_grad for p in empty.parameters())


@pytest.mark.parametrize("fields", KINDS, ids=["plain", "projected"])
def test_the_start_depends_on_seed_and_name_alone_and_draws_nothing_else(fields):
    method = PrefixTuning(num_virtual_tokens=4, **fields)
    first, again, other = (prefixed(method, seed=s)[1].trainable_state() for s in (1, 1, 2))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    model, state = tiny_llama(), torch.get_rng_state()
    minift.apply(model, method)
    assert torch.equal(torch.get_rng_state(), state)


LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}


@pytest.mark.parametrize("kv_heads, trained", [(32, 5_242_880), (8, 1_310_720)])
def test_the_counts_of_llama_2_7b_and_3_8b_on_the_meta_device(kv_heads, trained):
    with torch.device("meta"):
        model = Llama(tiny_config(**LLAMA, head_dim=128, num_key_value_heads=kv_heads))
    plan = minift.apply(model, PrefixTuning(num_virtual_tokens=20))
    assert plan.trainable == trained == model.slots[0].prompt_embeddings.numel()
    assert plan.sites[0].formula == f"20 x 32 x 2 x {128 * kv_heads}" and model.slots[0].get_parameter(
        "prompt_embeddings"
    ).shape == (20, 2 * 32 * 128 * kv_heads)
    with torch.device("meta"):
        model = Llama(tiny_config(**LLAMA, head_dim=128, num_key_value_heads=kv_heads))
    method = PrefixTuning(num_virtual_tokens=20, prefix_projection=True, encoder_hidden_size=512)
    width = 128 * kv_heads
    hand = 20 * width + (width + 1) * 512 + (512 + 1) * 64 * width
    assert minift.apply(model, method).trainable == hand == sum(p.numel() for p in model.slots.parameters())
    assert all(p.is_meta for p in model.parameters())


def test_switched_off_or_removed_it_is_the_base_to_the_bit_and_it_cannot_be_merged():
    model, base = prefixed(PrefixTuning(num_virtual_tokens=4))[0], tiny_llama()
    assert not torch.equal(model(IDS), base(IDS))
    with pytest.raises(ValueError, match="prefix_tuning cannot be merged: virtual tokens stand before"):
        minift.merge(model)
    with model.adapters.disable():
        assert torch.equal(model(IDS), base(IDS))
    model.adapters.remove("default")
    assert torch.equal(model(IDS), base(IDS)) and not model.slots


def test_other_adapters_merge_beside_it():
    model = prefixed(PrefixTuning(num_virtual_tokens=4), dtype=torch.float64)[0]
    minift.apply(model, minift.LoRA(r=2), name="branch")
    for layer in model.adapters["branch"].modules.values():
        torch.nn.init.normal_(layer.double().lora_B, std=0.1)
    want = copy.deepcopy(model)(IDS)
    minift.merge(model, "branch")
    # 2 blocks of 7 products of at most 97 terms in a row: 1.5e-13 of the largest logit
    assert (model(IDS) - want).abs().max() <= 1e-12 * want.abs().max()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it is a whole number of at least 1"),
        ({"prefix_projection": 1}, "prefix_projection is 1; it is True or False"),
        ({"encoder_hidden_size": 64}, "encoder_hidden_size is 64 and prefix_projection is false"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size is -1"),
        ({"num_virtual_tokens": 64}, "num_virtual_tokens is 64, and the model's context is 64"),
    ],
)
def test_bad_input_is_one_sentence(fields, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        minift.apply(model, PrefixTuning(**fields))
    assert not model.adapters and not model.slots


def test_a_model_whose_blocks_take_no_prefix_is_refused():
    model = tiny_llama()
    model.takes_prefix = False
    with pytest.raises(ValueError, match="prefix_tuning cannot run on this model: .* Llama take no prefix"):
        minift.apply(model, PrefixTuning())
