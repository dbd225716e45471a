"""Every method on a tiny model of every family: its language model, and a classifier whose head is new.

A new family is tested by being in MODELS, a new method by being in METHODS.
"""

import copy

import pytest
import torch
from bases import nudge, quantized_as
from tiny import tiny

import minift
from minift.methods import METHODS
from minift.methods.base import trainable
from minift.models import MODELS
from minift.models.heads import LANGUAGE_MODELS
from minift.models.interface import LanguageModel, parameter_count

IDS = torch.tensor([[5, 9, 33, 8, 71, 1], [0, 0, 6, 7, 2, 1]])  # a T5 classifies what stands at the 1
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
FAMILIES = {}  # class -> the architecture of its language model
for architecture, (family, _, head) in MODELS.items():
    if head in LANGUAGE_MODELS:
        FAMILIES.setdefault(family, architecture)
KINDS = ("lm", "new head")
FIELDS = {
    **{name: {"r": 2, "target_modules": "all-linear"} for name in ("lora", "qlora", "dora")},
    "adalora": {"r": 3, "target_r": 2, "target_modules": "all-linear"},
    **{name: {"num_virtual_tokens": 2} for name in ("prompt_tuning", "p_tuning", "prefix_tuning")},
    "bottleneck": {"bottleneck_dim": 2, "activation": "tanh"},  # relu is 0 at half of so few
    "selective": {"last_blocks": 1, "tied": "both"},
}
# (method, family, kind) -> why it does not run there
REFUSALS = {
    ("bitfit", "Llama", "lm"): "it has no bias terms",
    ("bitfit", "Llama", "new head"): "it has no bias terms",
    ("bitfit", "T5", "lm"): "it has no bias terms",
    ("bitfit", "T5", "new head"): "it has no bias terms",  # but in the head, which trains anyway
    ("prefix_tuning", "T5", "lm"): "the blocks of T5 take no prefix",
    ("prefix_tuning", "T5", "new head"): "the blocks of T5 take no prefix",
}
CASES = [  # of a variant of a family the classifier alone
    (method, family.__name__, kind)
    for family in FAMILIES
    for kind in (KINDS if family.__base__ is LanguageModel else ("new head",))
    for method in METHODS
    if (method, family.__name__, kind) not in REFUSALS
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(family, kind, seed of a new head) -> the model; loaded once and copied."""
    folders, made = {}, {}
    for family, architecture in FAMILIES.items():
        blocks = dict.fromkeys(MODELS[architecture][1].BLOCKS, 1)
        folders[family.__name__] = tmp_path_factory.mktemp("base")
        made[family.__name__, "lm", 0] = made[family.__name__, "lm", 1] = tiny(architecture, **blocks)
        minift.save_model(made[family.__name__, "lm", 0], folders[family.__name__])

    def base(family, kind, seed=0):
        key = family, kind, seed
        if key not in made:
            head = {"head": "sequence_classification", "num_labels": 2, "seed": seed}
            made[key] = minift.load_model(folders[family], **head)
        return copy.deepcopy(made[key])

    return base


def output(model):
    lm = model.is_encoder_decoder and model.head_kind == "seq2seq_lm"
    more = {"decoder_input_ids": IDS[:, 2:]} if lm else {}
    return model(IDS, attention_mask=MASK, **more)


def method_of(name):
    return METHODS[name](**FIELDS.get(name, {}))


@pytest.mark.parametrize("case", REFUSALS, ids="-".join)
def test_what_does_not_run_says_why(case, bases):
    name, family, kind = case
    with pytest.raises(ValueError, match=REFUSALS[case]):
        minift.apply(bases(family, kind), method_of(name))


@pytest.mark.parametrize("name, family, kind", CASES)
def test_it_starts_as_the_base_counts_its_tensors_and_moves_them_alone(name, family, kind, bases):
    model, method = bases(family, kind), method_of(name)
    want, before = output(quantized_as(method, bases(family, kind))), parameter_count(model)
    plan = minift.apply(model, method)
    alike = name == "qlora" or method.identity_at_init == "bitwise"  # qlora as its quantized base
    assert torch.equal(output(model), want) == alike
    declared = trainable(model)
    assert plan.trainable == sum(p.numel() for p in declared.values()) and plan.total == before + plan.added
    assert kind == "lm" or all(any(new in name for name in declared) for new in model.new_modules)
    nudge(model)  # no factor stays at zero
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    found = output(model)
    (found * torch.randn(found.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert {key for key, p in declared.items() if p.grad is None or not p.grad.isfinite().all()} == set()
    reached = {key for key, p in declared.items() if p.grad.any()}
    assert len(reached) > 0.8 * len(declared)  # what moves every score of a text alike has no gradient
    torch.optim.AdamW(declared.values(), lr=0.01, weight_decay=0.0).step()
    moved = {key for key, p in model.named_parameters() if not torch.equal(p, start[key])}
    assert moved == reached


@pytest.mark.parametrize("name, family, kind", [case for case in CASES if case[0] != "full"])
def test_a_file_brings_it_back_onto_another_new_head(name, family, kind, bases, tmp_path):
    model, method = bases(family, kind), method_of(name)
    minift.apply(model, method)
    nudge(model)
    minift.save_adapter(model, tmp_path)
    fresh = quantized_as(method, bases(family, kind, seed=1))
    minift.load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(model))


@pytest.mark.parametrize("name, family, kind", CASES)
def test_merged_it_computes_the_same_or_says_why_it_cannot_be(name, family, kind, bases):
    model, method = bases(family, kind), method_of(name)
    minift.apply(model, method)
    nudge(model)
    want = output(model)
    if method.unmergeable:
        with pytest.raises(ValueError, match=f"{name} cannot be merged: "):
            minift.merge(model)
        return
    minift.merge(model)
    assert not model.adapters
    # W + B A is rounded once more than W x + B A x: a few hundred roundings of fp32 through a block
    assert (output(model) - want).abs().max() <= 300 * 2.0**-24 * want.abs().max()
