"""P-tuning: the encoder against its equations, its count, and what an adapter file holds."""

import pytest
import torch
from conftest import tiny_config, tiny_llama
from mutants import survives

import minift
from minift.methods import p_tuning
from minift.methods.base import trainable
from minift.methods.p_tuning import PTuning
from minift.models.generate import generate
from minift.models.llama import Llama

IDS = torch.arange(20).view(2, 10) % 97
KINDS = [{"encoder": "mlp"}, {"encoder": "lstm"}]


def encoded(method, seed=0, dtype=torch.float32):
    model = tiny_llama(dtype)
    minift.apply(model, method, seed=seed)
    return model, model.slots[0]


def linear(x, tensors, name):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def lstm(x, tensors, layer, backwards):
    """A cell with input, forget and output gates over the rows of x: (n, in) -> (n, H)."""
    end = f"_l{layer}" + "_reverse" * backwards
    W, U, b, c = (tensors[f"lstm.{k}{end}"] for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    H, hidden = U.shape[1], []
    h = cell = x.new_zeros(H)
    for row in x.flip(0) if backwards else x:
        i, f, g, o = (W @ row + b + U @ h + c).split(H)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        hidden.append(h)
    return torch.stack(hidden[::-1] if backwards else hidden)


def prompt(tensors):
    """P of the parameters by name, in their dtype."""
    x = tensors["embedding"]
    if "mlp.4.weight" in tensors:
        x = linear(x, tensors, "mlp.0").relu()
        return linear(linear(x, tensors, "mlp.2").relu(), tensors, "mlp.4")
    for layer in (0, 1):
        x = torch.cat([lstm(x, tensors, layer, backwards) for backwards in (False, True)], dim=1)
    return linear(linear(x, tensors, "mlp.0").relu(), tensors, "mlp.2")


# Up to 4 layers of sums of at most 97 terms one after the other, each rounded to 2^-53, and the 5 rows of the
# recurrence: 4 * 5 * 97 * 2^-53 = 2.2e-13 of the largest number.
FP64 = 1e-12


def check(module):
    """P, its starts, the count and the rows of the plan, from the definitions."""
    for n, H, kind in ((5, 6, "mlp"), (5, 6, "lstm"), (3, 0, "mlp"), (2, 40, "lstm")):
        method = module.PTuning(num_virtual_tokens=n, encoder=kind, encoder_hidden_size=H)
        model, slot = encoded(method, seed=2)
        H, D = H or 32, 32
        gates = 2 * 4 * (H * (D + H) + 2 * H) + 2 * 4 * (H * (2 * H + H) + 2 * H)
        head = (2 * H * 2 * H + 2 * H) + (2 * H * D + D)
        hand = n * D + (gates + head if kind == "lstm" else (D * H + H) + (H * H + H) + (H * D + D))
        plan = model.adapters["default"].plan
        assert method.count(plan) == hand == sum(p.numel() for p in trainable(model).values())
        assert plan.added == hand and all(p.dtype == torch.float32 for p in slot.parameters())
        for name, p in slot.named_parameters():
            fan_in = None if name == "embedding" else H if "lstm" in name else p.shape[-1]
            if "mlp" in name and "bias" in name:
                fan_in = slot.get_parameter(name.replace("bias", "weight")).shape[1]
            # the largest of m uniform draws is above 1 - 20 / m with probability 1 - exp(-20)
            if fan_in:
                share = p.abs().max() * fan_in**0.5
                assert 1 - 20 / p.numel() < share <= 1.0001, name
            else:
                assert abs(p.std() - 1) < 5 / (2 * p.numel()) ** 0.5
        tensors = {name: p.detach().double() for name, p in slot.double().named_parameters()}
        want = prompt(tensors)
        assert slot.state().keys() == {"prompt_embeddings"} and want.std() > 0.01
        assert (slot.prompt() - want).abs().max() <= FP64 * (1 + want.abs().max())
        assert torch.equal(slot.state()["prompt_embeddings"], slot.prompt())


def test_the_encoder_its_start_and_its_count_are_the_definitions():
    check(p_tuning)


@pytest.mark.parametrize(
    "old, new",
    [
        ("num_layers=2, bidirectional=True", "num_layers=1, bidirectional=True"),
        ("(2 * H, 2 * H, D)", "(2 * H, H, D)"),
        ("(D, H, H, D) if", "(D, H, D) if"),
        ("for part in (layer, nn.ReLU())", "for part in (layer, nn.Tanh())"),
        ("self.lstm(self.embedding)[0]", "self.lstm(self.embedding.flip(0))[0]"),
        ("        return self.mlp(h)\n", "        return self.mlp(h).flip(0)\n"),
        ("bound = width**-0.5", "bound = 0.5 * width**-0.5"),
        ("bound = width**-0.5", "bound = (6 / width) ** 0.5"),
        ("slot.embedding.copy_(torch.randn(", "slot.embedding.copy_(0.1 * torch.randn("),
        ("return n * D + H * (D + 1) + H * (H + 1)", "return n * D + H * D + H * (H + 1)"),
        ("8 * H * (3 * H + 2) + 2 * H", "8 * H * (2 * H + 2) + 2 * H"),
        ("size, formula = 8 * H * (fan_in + H + 2)", "size, formula = 8 * H * (fan_in + H + 1)"),
        ("fan_out * (fan_in + 1), formula", "fan_out * fan_in, formula"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, p_tuning, old, new)


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["encoder"])
def test_gradients_of_the_encoder_are_those_of_its_equations(fields):
    slot = encoded(PTuning(num_virtual_tokens=4, encoder_hidden_size=5, **fields))[1].double()
    weights = torch.randn(4, 32, dtype=torch.float64)
    got = torch.autograd.grad((slot.prompt() * weights).sum(), list(slot.parameters()))
    copies = {name: p.detach().clone().requires_grad_() for name, p in slot.named_parameters()}
    want = torch.autograd.grad((prompt(copies) * weights).sum(), list(copies.values()))
    for name, a, b in zip(copies, got, want, strict=True):
        assert (a - b).abs().max() <= FP64 * (1 + b.abs().max()), name


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["encoder"])
def test_the_exported_prompt_is_the_same_model_without_an_encoder(fields):
    for dtype in (torch.float32, torch.bfloat16):
        model, slot = encoded(PTuning(num_virtual_tokens=4, **fields), dtype=dtype)
        plain = tiny_llama(dtype)
        minift.apply(plain, minift.PromptTuning(num_virtual_tokens=4))
        plain.slots[0].load(slot.state())
        assert slot.encoded and not plain.slots[0].encoded
        assert torch.equal(model(IDS), plain(IDS))
        assert generate(model, [[5, 9], [7]], 8) == generate(plain, [[5, 9], [7]], 8)


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["encoder"])
def test_training_goes_on_from_the_trainable_state_and_not_from_the_export(fields):
    model, slot = encoded(PTuning(num_virtual_tokens=4, **fields), seed=1)
    other, empty = encoded(PTuning(num_virtual_tokens=4, **fields), seed=2)
    assert not torch.equal(model(IDS), other(IDS))
    empty.load(slot.trainable_state())
    assert torch.equal(model(IDS), other(IDS))
    for a, b in zip(slot.parameters(), empty.parameters(), strict=True):
        assert torch.equal(a, b) and b.requires_grad
    with pytest.raises(
        ValueError, match=r"\['prompt_embeddings'\] were given; an encoder cannot be had back"
    ):
        empty.load(slot.state())


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["encoder"])
def test_every_part_of_the_encoder_trains_on_any_base(fields):
    for base in ("float32", "bfloat16", "nf4", "int8"):
        quantized = base in ("nf4", "int8")
        model = tiny_llama(torch.float32 if quantized else getattr(torch, base))
        if quantized:
            minift.quantize_model(model, base)
        minift.apply(model, PTuning(num_virtual_tokens=3, **fields))
        model(IDS).float().square().mean().backward()
        for name, p in trainable(model).items():
            assert p.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().max() > 0, name
        assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("slots."))


@pytest.mark.parametrize("fields", KINDS, ids=lambda f: f["encoder"])
def test_the_start_depends_on_seed_and_name_alone_and_draws_nothing_else(fields):
    state = torch.get_rng_state()
    method = PTuning(num_virtual_tokens=4, **fields)
    first, again, other = (encoded(method, seed=s)[1].trainable_state() for s in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    model = tiny_llama()
    torch.set_rng_state(state)
    minift.apply(model, method)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "fields, hand",
    [
        ({"encoder": "mlp"}, 20 * 4096 + 3 * (4096 * 4096 + 4096)),
        ({"encoder": "lstm", "encoder_hidden_size": 1024}, 79_812_608),
    ],
)
def test_the_counts_of_llama_3_8b_on_the_meta_device(fields, hand):
    wide = {"hidden_size": 4096, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = Llama(tiny_config(**wide))
    plan = minift.apply(model, PTuning(num_virtual_tokens=20, **fields))
    assert plan.trainable == plan.added == hand == sum(p.numel() for p in trainable(model).values())
    assert all(p.is_meta for p in model.parameters())


def test_switched_off_it_is_the_base_to_the_bit_and_it_cannot_be_merged():
    model = encoded(PTuning(num_virtual_tokens=4))[0]
    with model.adapters.disable():
        assert torch.equal(model(IDS), tiny_llama()(IDS))
    with pytest.raises(ValueError, match="p_tuning cannot be merged: virtual tokens stand before the text"):
        minift.merge(model)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it is a whole number of at least 1"),
        ({"encoder": "gru"}, "encoder is 'gru'; it is one of mlp, lstm"),
        ({"encoder_hidden_size": -1}, "encoder_hidden_size is -1; it is a whole number of at least 0"),
        ({"encoder_hidden_size": 1.5}, "encoder_hidden_size is 1.5"),
        ({"num_virtual_tokens": 64}, "num_virtual_tokens is 64, and the model's context is 64"),
    ],
)
def test_bad_input_is_one_sentence(fields, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        minift.apply(model, PTuning(**fields))
    assert not model.adapters and not model.slots
