"""The laws that every method keeps, on every kind of base; a new method is tested by being in METHODS."""

import copy

import pytest
import torch
from bases import CASES, IDS, REFUSALS, add_biases, base_model, method_for, nudge, quantized_as
from conftest import tiny_llama
from safetensors.torch import load_file

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.models.interface import parameter_count
from minift.models.llama import Llama
from minift.models.wrappers import Wrapper
from minift.training.folder import save_trained


@pytest.fixture(params=CASES, ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    name, base = request.param
    return method_for(name, base), base_model(base, name)


@pytest.mark.parametrize("name, base", REFUSALS)
def test_what_does_not_run_says_why_and_touches_nothing(name, base):
    model = base_model(base, name)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=REFUSALS[name, base]):
        minift.apply(model, METHODS[name]())
    assert not model.adapters and before == {n: p.requires_grad for n, p in model.named_parameters()}


def test_starts_as_the_base_model(case):
    method, model = case
    base = copy.deepcopy(model)
    minift.apply(model, method)
    base.to(model.dtype)  # full fine-tuning of a bf16 model computes its weights in fp32
    if method.name == "qlora":
        assert torch.equal(model(IDS), quantized_as(method, base)(IDS))
    elif method.identity_at_init == "bitwise":
        assert torch.equal(model(IDS), base(IDS))
    else:
        assert method.identity_at_init == "none" and not torch.equal(model(IDS), base(IDS))


def test_switched_off_or_removed_it_is_the_base_to_the_bit(case):
    method, model = case
    base = copy.deepcopy(model)
    minift.apply(model, method)
    nudge(model)
    changed = model(IDS)
    if not model.adapters["default"].parts:
        with pytest.raises(ValueError, match="changed the base weights themselves"):
            model.adapters.switch()
        return
    want = quantized_as(method, base)(IDS)
    with model.adapters.disable():
        assert torch.equal(model(IDS), want)
    assert torch.equal(model(IDS), changed) and not torch.equal(changed, want)
    model.adapters.remove("default")
    assert torch.equal(model(IDS), want) and not model.slots
    assert not any(isinstance(m, Wrapper) for m in model.modules())


def test_the_count_is_the_tensors_and_the_bytes_on_disk(case, tmp_path):
    method, model = case
    base = parameter_count(model)
    plan = minift.apply(model, method)
    counted = method.count(plan)
    assert counted == plan.trainable == sum(p.numel() for p in trainable(model).values())
    assert counted == sum(site.parameters for site in plan.sites)
    assert plan.total == parameter_count(model) == base + plan.added
    save_trained(model, tmp_path, "none")
    encoder = tmp_path / "adapter_encoder.safetensors"
    stored = load_file(encoder if encoder.exists() else next(tmp_path.rglob("*.safetensors")))
    assert sum(t.numel() for t in stored.values()) == counted
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 4 * counted


def test_the_plan_is_the_same_on_the_meta_device(case):
    method, model = case
    with torch.device("meta"):
        shapes = Llama(model.config)
    if method.name == "bitfit":
        add_biases(shapes, "meta")
    if model.quantization:
        minift.quantize_model(shapes, model.quantization[0].format)
    assert method.plan(shapes) == method.plan(model)
    plan = minift.apply(shapes, method)
    assert all(p.is_meta for p in shapes.parameters())
    assert plan.trainable == sum(p.numel() for p in trainable(shapes).values())


def test_trainable_parameters_are_fp32_and_only_they_move(case):
    method, model = case
    minift.apply(model, method)
    declared = trainable(model)
    assert declared and {p.dtype for p in declared.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        loss = model(IDS).float().square().mean()
        extra = method.extra_loss(model, "default")
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(declared)
    assert all(p.dtype == before[name].dtype for name, p in model.named_parameters())


def gradients(model):
    model.zero_grad()
    model(IDS).float().square().mean().backward()
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def test_every_trainable_parameter_gets_a_finite_gradient_also_under_checkpointing(case):
    method, model = case
    minift.apply(model, method)
    nudge(model)
    plain = gradients(model)
    for name, gradient in plain.items():
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0, name
    model.gradient_checkpointing = True
    recomputed = gradients(model)
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_parameter_groups_hold_every_trainable_parameter_once(case):
    method, model = case
    minift.apply(model, method)
    groups = method.param_groups(trainable(model))
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainable(model).values())
    assert all(group["lr_ratio"] == 1 for group in groups)


def test_greedy_tokens_are_the_same_with_a_cache_without_one_and_in_any_batch(case):
    method, model = case
    model = model.float()
    minift.apply(model, method)
    nudge(model)
    prompts = [[5, 9, 33], [8], [3, 60, 61, 62, 63, 64, 7]]
    together = minift.generate(model, prompts, 8)
    assert together == minift.generate(model, prompts, 8, use_cache=False)
    assert together == [minift.generate(model, [prompt], 8)[0] for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    ids, mask = torch.zeros(2, 3, max(lengths), dtype=torch.long).unbind()
    for row, prompt in enumerate(prompts):  # padded on the right
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
    logits = model(ids, attention_mask=mask)
    first = [int(logits[row, n - 1].argmax()) for row, n in enumerate(lengths)]
    assert first == [tokens[0] for tokens in together]


def test_save_and_load_are_bitwise_and_what_was_loaded_trains_on(case, tmp_path):
    method, model = case
    fresh = copy.deepcopy(model)
    minift.apply(model, method)
    nudge(model)
    if not method.adapter_file:
        with pytest.raises(ValueError, match="full has no adapter file; minift.merge"):
            minift.save_adapter(model, tmp_path)
        return
    minift.save_adapter(model, tmp_path / "a")
    fresh = quantized_as(method, fresh)
    minift.load_adapter(fresh, tmp_path / "a")
    ours, theirs = trainable(model), trainable(fresh)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert torch.equal(model(IDS), fresh(IDS))
    minift.save_adapter(fresh, tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        other = (tmp_path / "b" / path.name).read_bytes()
        if method.name != "qlora":  # which loads as the lora that it is
            assert path.read_bytes() == other, path.name
    gradients(fresh)


def test_merging_removes_the_adapter_reports_its_rounding_and_is_undone_to_the_bit(case):
    method, model = case
    minift.apply(model, method)
    nudge(model)
    before = model(IDS)
    if method.unmergeable:
        with pytest.raises(ValueError, match=f"{method.name} cannot be merged: "):
            minift.merge(model)
        assert torch.equal(model(IDS), before)
        return
    errors = minift.merge(model, keep=True)
    assert not model.adapters and not trainable(model)
    assert not any(isinstance(m, Wrapper) for m in model.modules())
    assert errors and all(0 <= e < 0.05 for e in errors.values())
    if method.adapter_file:
        minift.unmerge(model, "default")
        assert torch.equal(model(IDS), before)


def test_the_start_depends_on_seed_and_path_alone(case):
    method, model = case

    def start(seed):
        made = copy.deepcopy(model)
        torch.manual_seed(17 * seed)
        minift.apply(made, method, seed=seed)
        return {name: p.detach() for name, p in trainable(made).items()}

    a, b, c = start(3), start(3), start(4)
    assert all(torch.equal(a[n], b[n]) for n in a)
    random = any(not torch.equal(a[n], c[n]) for n in a)
    assert random == (method.name not in ("full", "selective", "bitfit", "ln_tuning", "ia3"))


def test_the_order_of_rules_does_not_matter_for_the_start():
    def start(order):
        model = tiny_llama()
        minift.apply(model, minift.LoRA(r=2, target_modules=order), seed=3)
        return {name: p.detach() for name, p in trainable(model).items()}

    a, b = start(["q_proj", "v_proj"]), start(["v_proj", "q_proj"])
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    only_v = start(["v_proj"])
    assert only_v and all(torch.equal(a[n], only_v[n]) for n in only_v)
