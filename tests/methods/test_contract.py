"""The laws that every method keeps, on every dtype; a new method is tested by being in METHODS."""

import copy

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.models.interface import parameter_count
from minift.models.llama import Llama
from minift.training.folder import save_trained

BASES = ["float32", "bfloat16", "nf4"]
IDS = torch.arange(24).view(2, 12) % 97

# (method, base) -> why it does not run there
REFUSALS = {("full", "nf4"): "is quantized; full fine-tuning needs dense weights"}
CASES = [(name, base) for name in METHODS for base in BASES]


def base_model(base):
    if base != "nf4":
        return tiny_llama(getattr(torch, base))
    model = tiny_llama()
    minift.quantize_model(model, "nf4")
    return model


@pytest.fixture(params=[c for c in CASES if c not in REFUSALS], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    name, base = request.param
    return METHODS[name](), base_model(base)


@pytest.mark.parametrize("name, base", REFUSALS)
def test_what_does_not_run_says_why_and_touches_nothing(name, base):
    model = base_model(base)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=REFUSALS[name, base]):
        minift.apply(model, METHODS[name]())
    assert not model.adapters and before == {n: p.requires_grad for n, p in model.named_parameters()}


def nudge(model):
    """Move every trainable parameter, as a step would."""
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.05 * torch.randn_like(p))


def test_starts_as_the_base_model(case):
    method, model = case
    base = copy.deepcopy(model)
    minift.apply(model, method)
    base.to(model.embed.weight.dtype)  # full fine-tuning of a bf16 model computes its weights in fp32
    if method.identity_at_init == "none" and not base.quantization:
        minift.quantize_model(base, method.format, method.block_size, method.double_quant)
    assert torch.equal(model(IDS), base(IDS))


def test_the_count_is_the_tensors_and_the_bytes_on_disk(case, tmp_path):
    method, model = case
    base = parameter_count(model)
    plan = minift.apply(model, method)
    counted = method.count(plan)
    assert counted == plan.trainable == sum(p.numel() for p in trainable(model).values())
    assert counted == sum(site.parameters for site in plan.sites)
    assert plan.total == parameter_count(model) == base + plan.added
    save_trained(model, tmp_path)
    stored = load_file(next(tmp_path.rglob("*.safetensors")))
    assert sum(t.numel() for t in stored.values()) == counted
    assert sum(t.numel() * t.element_size() for t in stored.values()) == 4 * counted


def test_the_plan_is_the_same_on_the_meta_device(case):
    method, model = case
    with torch.device("meta"):
        shapes = Llama(model.config)
    if model.quantization:
        minift.quantize_model(shapes, "nf4")
    assert method.plan(shapes) == method.plan(model)
    minift.apply(shapes, method)
    assert all(p.is_meta for p in shapes.parameters())


def test_trainable_parameters_are_fp32_and_only_they_move(case):
    method, model = case
    minift.apply(model, method)
    declared = trainable(model)
    assert declared and {p.dtype for p in declared.values()} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(IDS).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(declared)


def test_every_trainable_parameter_gets_a_finite_gradient(case):
    method, model = case
    minift.apply(model, method)
    nudge(model)
    model(IDS).float().square().mean().backward()
    for name, p in trainable(model).items():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().max() > 0, name


def test_the_start_depends_on_seed_and_path_alone():
    def start(order, seed):
        model = tiny_llama()
        minift.apply(model, minift.LoRA(r=2, target_modules=order), seed=seed)
        return {name: p.detach() for name, p in trainable(model).items()}

    a, b, c = start(["q_proj", "v_proj"], 3), start(["v_proj", "q_proj"], 3), start(["q_proj", "v_proj"], 4)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert not any(torch.equal(a[n], c[n]) for n in a if n.endswith("lora_A"))
    only_v = start(["v_proj"], 3)
    assert all(torch.equal(a[n], only_v[n]) for n in only_v)


def test_merging_removes_the_adapter_and_reports_its_rounding(case):
    method, model = case
    minift.apply(model, method)
    nudge(model)
    errors = minift.merge(model)
    assert not model.adapters and not trainable(model)
    assert {type(m).__name__ for m in model.modules()}.isdisjoint({"LoRALinear"})
    assert errors and all(e >= 0 for e in errors.values())


def test_what_cannot_be_applied_or_merged_says_so():
    model = tiny_llama()
    with pytest.raises(ValueError, match="merge which adapter"):
        minift.merge(model)
    minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="'default' is resident"):
        minift.apply(model, minift.LoRA(r=2))
    with pytest.raises(ValueError, match="must not be empty or hold a dot"):
        minift.apply(model, minift.LoRA(r=2), name="a.b")
    with pytest.raises(ValueError, match="merge them first"):
        minift.apply(model, minift.Full(), name="other")
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        minift.merge(model, "x")


def test_a_plan_that_fails_touches_nothing():
    model = tiny_llama()
    with pytest.raises(ValueError):
        minift.apply(model, minift.LoRA(target_modules=["nothing"]))
    assert not model.adapters and all(p.requires_grad for p in model.parameters())


def test_the_plan_prints_the_table_and_the_known_line():
    plan = minift.LoRA(r=4, alpha=8, layers_to_transform=["0"]).plan(tiny_llama())
    assert "model.layers.0.self_attn.q_proj" in str(plan)
    assert "model.layers.{0-1}.self_attn.v_proj" in str(minift.LoRA(r=4).plan(tiny_llama()))
    assert len(plan.table().split("\n")) == 3
    trained = 4 * (32 + 32) + 4 * (32 + 16)
    share = 100 * trained / plan.total
    assert (
        plan.totals()
        == f"trainable params: {trained} || all params: {plan.total:,} || trainable%: {share:.4f}"
    )
