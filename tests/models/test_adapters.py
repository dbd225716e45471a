"""model.adapters: add, switch, disable, rows, remove; nothing moves the base's bits."""

import copy
import time

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import minift
from minift.methods.base import trainable
from minift.models.wrappers import bare_modules, base_layers, base_parameters, chain, get_module, innermost
from minift.training.objective import Objective

IDS = torch.arange(24).view(3, 8) % 97
METHODS = {
    "a": minift.LoRA(r=2, target_modules=["q_proj", "down_proj"]),
    "b": minift.LoRA(r=3, alpha=6, target_modules=["q_proj", "v_proj"]),
    "c": minift.LoRA(r=1, target_modules=["v_proj", "lm_head"]),
}


def with_adapters(names="abc", dtype=torch.float64):
    model = tiny_llama(dtype)
    for i, name in enumerate(names):
        minift.apply(model, METHODS[name], name=name, seed=i)
        torch.manual_seed(i)
        with torch.no_grad():
            for p in trainable(model).values():
                p.copy_(0.2 * torch.randn_like(p))
    return model


def alone(name, dtype=torch.float64):
    """The same adapter on a model of its own."""
    model, full = tiny_llama(dtype), with_adapters(dtype=dtype)
    minift.apply(model, METHODS[name], name=name)
    with torch.no_grad():
        for path, part in model.adapters[name].modules.items():
            for own, other in zip(
                part.parameters(recurse=False),
                full.adapters[name].modules[path].parameters(recurse=False),
                strict=True,
            ):
                own.copy_(other)
    return model


# fp64 of sums of at most 48 products, the terms in another order: 2 layers deep, values of order 10
CLOSE = {"rtol": 0, "atol": 1e-11}


@pytest.mark.parametrize("name", "abc")
def test_switching_leaves_one_adapter_as_if_it_were_alone(name):
    model = with_adapters()
    model.adapters.switch(name)
    assert model.adapters.active() == [name]
    assert torch.equal(model(IDS), alone(name)(IDS))


def test_no_adapter_is_the_base_to_the_bit_and_comes_back_to_the_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model, base = with_adapters(dtype=dtype), tiny_llama(dtype)
        before = model(IDS)
        assert not torch.equal(before, base(IDS))
        with model.adapters.disable():
            assert model.adapters.active() == [] and torch.equal(model(IDS), base(IDS))
        assert model.adapters.active() == ["a", "b", "c"] and torch.equal(model(IDS), before)


def test_two_active_adapters_add_up():
    model = with_adapters("ab")
    base = tiny_llama(torch.float64)
    for path in {**model.adapters["a"].modules, **model.adapters["b"].modules}:
        for name in "ab":
            part = model.adapters[name].modules.get(path)
            if part is not None:
                layer = get_module(base, path)
                layer.weight.data += part.delta(torch.float64)
    torch.testing.assert_close(model(IDS), base(IDS), **CLOSE)


@given(st.lists(st.sampled_from([None, "a", "b", "c", ("a", "c")]), min_size=3, max_size=3))
def test_mixed_adapters_in_one_batch_equal_each_alone(names):
    model = with_adapters()
    with model.adapters.rows(names):
        mixed = model(IDS)
    for i, name in enumerate(names):
        model.adapters.switch(*([name] if isinstance(name, str) else name or []))
        torch.testing.assert_close(mixed[i : i + 1], model(IDS[i : i + 1]), **CLOSE)


def test_rows_need_one_choice_for_each_text_and_known_names():
    model = with_adapters("a")
    with (
        pytest.raises(ValueError, match="chosen for 2 texts, and the batch holds 3"),
        model.adapters.rows(["a", None]),
    ):
        model(IDS)
    assert model.adapters.active() == ["a"]
    with (
        pytest.raises(ValueError, match="no adapter named 'x'; resident: \\['a'\\]"),
        model.adapters.rows(["x"]),
    ):
        pass
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        model.adapters.switch("x")
    assert model.adapters.active() == ["a"]


@pytest.mark.parametrize("order", ["abc", "cba", "bac"])
def test_removing_in_any_order_leaves_the_others_and_then_the_base(order):
    model, base = with_adapters(), tiny_llama(torch.float64)
    left = ["a", "b", "c"]
    for name in order:
        model.adapters.remove(name)
        left.remove(name)
        assert list(model.adapters) == left
        assert {p for p, m in bare_modules(model).items() if chain(m)} == {
            p for other in left for p in model.adapters[other].modules
        }
    assert torch.equal(model(IDS), base(IDS))
    assert [type(m) for m in model.modules()] == [type(m) for m in base.modules()]
    with pytest.raises(ValueError, match="no adapter named 'a'; resident: none"):
        model.adapters.remove("a")


def test_paths_are_those_of_the_bare_model():
    model, base = with_adapters(), tiny_llama(torch.float64)
    assert list(bare_modules(model)) == list(bare_modules(base))
    assert list(base_layers(model)) == list(base_layers(base))
    ours, theirs = base_parameters(model), base_parameters(base)
    assert list(ours) == list(theirs) == [n for n, _ in base.named_parameters()]
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert all(innermost(get_module(model, p)) is innermost(m) for p, m in bare_modules(model).items())


def test_a_copy_of_a_model_has_adapters_of_its_own():
    model = with_adapters("ab")
    other = copy.deepcopy(model)
    other.adapters.switch("a")
    assert model.adapters.active() == ["a", "b"] and other.adapters.active() == ["a"]
    assert other.adapters.model is other
    other.adapters.remove("b")
    assert list(model.adapters) == ["a", "b"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("a", "an adapter named 'a' is resident already"),
        ("", "may hold letters"),
        ("x.y", "may hold letters, digits, '_' and '-', and no dot"),
        ("../x", "may hold letters"),
        ("lora", "'lora' is the key of a method"),
        ("full", "'full' is the key of a method"),
    ],
)
def test_names_that_would_collide_are_refused_and_nothing_is_touched(name, message):
    model = with_adapters("a")
    before, trains = model(IDS), set(trainable(model))
    with pytest.raises(ValueError, match=message):
        minift.apply(model, METHODS["b"], name=name)
    assert (
        torch.equal(model(IDS), before) and list(model.adapters) == ["a"] and set(trainable(model)) == trains
    )


def test_what_trains_the_base_itself_cannot_be_switched_off():
    model = tiny_llama()
    minift.apply(model, minift.Full())
    for act in (model.adapters.switch, lambda: model.adapters.remove("default")):
        with pytest.raises(ValueError, match="full changed the base weights themselves"):
            act()
    assert list(model.adapters) == ["default"]


def test_switching_copies_nothing_and_takes_milliseconds():
    model = with_adapters()
    pointers = [p.data_ptr() for p in model.parameters()]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        model.adapters.switch("b")
        times.append(time.perf_counter() - start)
    assert pointers == [p.data_ptr() for p in model.parameters()]
    assert min(times) < 1e-3  # flags of 10 wrappers


def test_contexts_nest_and_give_back_what_was_and_let_adapters_come_and_go():
    model = with_adapters()
    with model.adapters.rows(["a", None, "b"]):
        mixed = model(IDS)
        with model.adapters.disable():
            minift.apply(model, METHODS["b"], name="new")
        assert "new" in model.adapters.active()
        model.adapters.remove("new")
        with model.adapters.rows([None, "c", "c"]):
            assert not torch.equal(model(IDS), mixed)
        assert torch.equal(model(IDS), mixed)
        model.adapters.remove("c")
    assert model.adapters.active() == ["a", "b"] and not model.adapters.by_rows()
    with pytest.raises(RuntimeError), model.adapters.disable():
        raise RuntimeError
    assert model.adapters.active() == ["a", "b"]


def test_a_method_that_fails_half_way_leaves_nothing():
    model = tiny_llama()
    model.model.layers[1].self_attn.q_proj.weight.data[0, 0] = float("nan")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises((RuntimeError, ValueError)):
        minift.apply(model, minift.LoRA(r=2, init="pissa", target_modules=["q_proj"]))
    assert not model.adapters and not any(chain(m) for m in bare_modules(model).values())
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_loss_wants_one_choice_for_all_texts():
    model = with_adapters("a")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    with model.adapters.rows(["a", None, "a"]), pytest.raises(ValueError, match="leave adapters.rows first"):
        Objective(model)(batch)


def test_what_trains_is_chosen_and_what_works_is_another_choice():
    model = with_adapters("ab")
    own = {
        n: {id(p) for part in model.adapters[n].parts for p in part.parameters(recurse=False)} for n in "ab"
    }
    assert {id(p) for p in trainable(model).values()} == own["b"]
    model.adapters.switch(["a"])
    assert repr(model.adapters) == "a: lora, active\nb: lora, resting, trains"
    model.adapters.train("a")
    assert {id(p) for p in trainable(model).values()} == own["a"]
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        model.adapters.train("x")
    assert {id(p) for p in trainable(model).values()} == own["a"]
    assert repr(tiny_llama().adapters) == "no adapters"
