"""The fields of LoRA: scaling, patterns, layers, whole modules, two learning rates; published counts."""

import copy

import pytest
import torch
from conftest import CharTokenizer, tiny_llama
from torch.func import functional_call

import minift
from minift.methods.base import trainable
from minift.methods.lora import LoRA
from minift.models.llama import Llama, LlamaConfig
from minift.training.settings import TrainConfig

IDS = torch.arange(24).view(2, 12) % 97
HEAD, EMBED = "lm_head", "model.embed_tokens"
Q0, V0, Q1 = (f"model.layers.{i}.self_attn.{n}_proj" for i, n in ((0, "q"), (0, "v"), (1, "q")))
# fp64: 2 blocks of 7 products, there and back, sums of at most 97 terms, against the largest entry
FP64 = 4 * 7 * 97 * 2.0**-53


def adapted(method):
    """A tiny fp64 model with an adapter away from its start, and the plan."""
    model = tiny_llama(torch.float64)
    plan = minift.apply(model, method)
    model.double()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in trainable(model).values():
            p.add_(0.2 * torch.randn_like(p))
    return model, plan


def dense(weights):
    """Logits of a bare fp64 model with some weights replaced."""
    bare = tiny_llama(torch.float64)
    return functional_call(bare, {f"{path}.weight": w.detach() for path, w in weights.items()}, (IDS,))


def close(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= FP64 * want.abs().max(), (got - want).abs().max() / want.abs().max()


@pytest.mark.parametrize("rslora", [False, True])
def test_rslora_divides_by_the_root_of_the_rank(rslora):
    model, plan = adapted(LoRA(r=4, alpha=6.0, rslora=rslora, target_modules=["q_proj"]))
    s = 3.0 if rslora else 1.5
    assert {site.scaling for site in plan.sites} == {s}
    layers = model.adapters["default"].modules
    close(model(IDS), dense({p: m.base.weight + s * m.lora_B @ m.lora_A for p, m in layers.items()}))


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ({}, (4, 4, 4)),
        ({"q_proj": 2}, (2, 4, 2)),
        ({"self_attn.v_proj": 2}, (4, 2, 4)),
        ({Q1: 1, "q_proj": 2}, (2, 4, 1)),  # the first rule that fits counts
        ({"*.0.*": 3, "q_proj": 2}, (3, 3, 2)),
        ({"model.layers.[1-9].*": 5}, (4, 4, 5)),
        ({"*": 6}, (6, 6, 6)),
    ],
)
def test_the_first_rule_of_a_pattern_that_fits_counts(pattern, expected):
    model = tiny_llama()
    sites = {s.path: s for s in LoRA(r=4, alpha=8.0, rank_pattern=pattern).plan(model).sites}
    assert tuple(sites[path].r for path in (Q0, V0, Q1)) == expected
    assert all(site.scaling == 8.0 / site.r for site in sites.values())
    alphas = {rule: float(value) for rule, value in pattern.items()}
    sites = {s.path: s for s in LoRA(r=2, alpha=4.0, alpha_pattern=alphas).plan(model).sites}
    assert tuple(sites[path].scaling * 2 for path in (Q0, V0, Q1)) == expected
    plan = minift.apply(model, LoRA(r=4, rank_pattern=pattern))
    assert plan.trainable == sum(p.numel() for p in trainable(model).values())


def test_a_pattern_reaches_the_wrapper():
    model = tiny_llama()
    method = LoRA(r=4, alpha=8.0, rank_pattern={Q0: 2}, alpha_pattern={"v_proj": 1.0})
    minift.apply(model, method)
    layers = model.adapters["default"].modules
    assert layers[Q0].lora_A.shape == (2, 32) and layers[Q0].scaling == 4 and layers[Q1].scaling == 2
    assert layers[V0].scaling == 0.25


@pytest.mark.parametrize("field, value", [("rank_pattern", 2), ("alpha_pattern", 2.0)])
@pytest.mark.parametrize("rules, dead", [(["k_proj"], "k_proj"), (["q_proj", Q1], Q1)])
def test_a_rule_of_a_pattern_that_never_counts_is_an_error(field, value, rules, dead):
    method = LoRA(**{field: dict.fromkeys(rules, value)})
    with pytest.raises(ValueError, match=rf"{field} \['{dead}'\] counts for no layer: .*target_modules"):
        method.plan(tiny_llama())


def test_layers_to_transform_takes_numbers_and_ranges():
    model = tiny_llama(num_hidden_layers=4)
    for layers, blocks in ((["1"], {1}), ([0, 2], {0, 2}), ("1-3", {1, 2, 3}), (3, {3})):
        plan = LoRA(layers_to_transform=layers).plan(model)
        assert {int(site.path.split(".")[2]) for site in plan.sites} == blocks
        assert plan.trainable == len(blocks) * 8 * (32 + 32 + 32 + 16)


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"target_modules": ["q_proj", Q0], "layers_to_transform": [1], "exclude_modules": []},
            rf"target_modules \['{Q0}'\] match only layers that .*layers_to_transform \['1'\] leave out",
        ),
        ({"target_modules": [HEAD], "layers_to_transform": [1]}, "target_modules.*layers_to_transform"),
        ({"exclude_modules": ["v_proj"]}, r"target_modules \['v_proj'\] match only .*exclude_modules"),
        ({"layers_to_transform": ["2"]}, "layers_to_transform '2' is outside the blocks 0-1"),
        ({"modules_to_save": ["v_proj"]}, f"target_modules and modules_to_save both mean {V0}"),
        ({"modules_to_save": ["self_attn"]}, f"target_modules and modules_to_save both mean {Q0}"),
        ({"rank_pattern": {"v_proj": 17}}, r"r is 17, above the smaller side of .*v_proj \(16 x 32\)"),
        ({"target_modules": ["embed_tokens"], "r": 33}, r"r is 33, above .*embed_tokens \(97 x 32\)"),
        ({"target_modules": ["embed_tokens"], "init": "pissa"}, "init 'pissa' is for linear layers, and t"),
    ],
)
def test_fields_that_contradict_each_other_are_errors_that_name_both(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields).plan(tiny_llama())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"lr_ratio": 0.0}, "lr_ratio is 0.0; it is a finite number above 0"),
        ({"rslora": 1}, "rslora is 1; it is True or False"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern q_proj is 0; it is a whole number of at least 1"),
        ({"alpha_pattern": {"q_proj": -1.0}}, "alpha_pattern q_proj is -1.0; it is a finite number above 0"),
        ({"alpha": float("inf")}, "alpha is inf; it is a finite number above 0"),
        ({"alpha": "16"}, "alpha is '16'; it is a finite number above 0"),
        ({"r": True}, "r is True; it is a whole number of at least 1"),
        ({"dropout": 1}, "dropout is 1; it is a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1; it is a number of at least 0 and below 1"),
        ({"init": ["pissa"]}, r"init is \['pissa'\]; it is one of"),
        ({"dropout": True}, "dropout is True; it is a number of at least 0 and below 1"),
        ({"init": "zeros"}, "init is 'zeros'; it is one of kaiming, gaussian, pissa, olora"),
        ({"tied": "yes"}, "tied is 'yes'; it is one of refuse, both, untie"),
    ],
)
def test_wrong_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**fields)


def test_modules_to_save_train_as_a_whole_beside_the_branches():
    model, plan = adapted(LoRA(r=2, modules_to_save=[HEAD, "model.norm"]))
    assert plan.trainable == 97 * 32 + 32 + 2 * 2 * (64 + 48)
    assert plan.base_parameters == plan.total - 2 * 2 * (64 + 48)  # copies stand in the base's place
    layers = model.adapters["default"].modules
    weights = {p: m.fold({"weight": m.base.weight})["weight"] for p, m in layers.items()}
    close(model(IDS), dense(weights))
    with model.adapters.disable():
        assert torch.equal(model(IDS), tiny_llama(torch.float64)(IDS))


# sizes of vocabulary, hidden states and MLP, numbers of layers, heads and key-value heads, head size
LLAMA_2 = LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128)
LLAMA_3 = LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128)


@pytest.mark.parametrize(
    "config, method, count",
    [
        (LLAMA_2, LoRA(r=8), 4_194_304),
        (LLAMA_2, LoRA(r=16, target_modules="all-linear"), 39_976_960),
        (LLAMA_2, LoRA(r=64, target_modules="all-linear"), 159_907_840),
        (LLAMA_3, LoRA(r=16, target_modules="all-linear"), 41_943_040),
        (LLAMA_3, LoRA(r=16, target_modules="all-linear", modules_to_save=[HEAD]), 567_279_616),
    ],
)
def test_the_counts_are_the_published_ones(config, method, count):
    with torch.device("meta"):
        model = Llama(config)
    assert minift.apply(model, method).trainable == count
    assert sum(p.numel() for p in trainable(model).values()) == count
    assert all(p.is_meta for p in model.parameters())


def test_the_second_factor_learns_lr_ratio_times_as_fast(tmp_path):
    model = tiny_llama(vocab_size=128)
    minift.apply(
        model, LoRA(r=2, lr_ratio=16.0, target_modules=["q_proj", EMBED], modules_to_save=["model.norm"])
    )
    with torch.no_grad():
        for name, p in trainable(model).items():
            if "norm" not in name:
                p.copy_(torch.randn_like(p))
    before = copy.deepcopy(trainable(model))
    settings = TrainConfig(
        output=str(tmp_path),
        max_steps=1,
        max_length=32,
        learning_rate=2.0**-10,
        batch_size=2,
        warmup_steps=0,
        weight_decay=0.0,
    )
    rows = [{"prompt": "abcdefgh", "completion": "ijklmnop"}] * 2
    minift.train(model, CharTokenizer(), rows, settings, quiet=True)
    for name, p in trainable(model).items():
        # the first step of Adam is the learning rate times g / (|g| + eps), and g is far above eps
        step = (p - before[name]).abs().max().item()
        assert step == pytest.approx(2.0**-10 * (16 if name.endswith(".lora_B") else 1), rel=1e-3), name


def test_parameter_groups_hold_each_parameter_once():
    model, _ = adapted(LoRA(lr_ratio=4.0, modules_to_save=[HEAD]))
    parameters, method = trainable(model), model.adapters["default"].method
    slow, fast = method.param_groups(parameters)
    assert (slow["lr_ratio"], fast["lr_ratio"]) == (1.0, 4.0)
    names = {p: name for name, p in parameters.items()}
    assert {names[p] for p in fast["params"]} == {name for name in parameters if name.endswith("lora_B")}
    assert len(slow["params"]) + len(fast["params"]) == len(parameters)
    [one] = LoRA().param_groups(parameters)
    assert one["params"] == list(parameters.values()) and one["lr_ratio"] == 1
