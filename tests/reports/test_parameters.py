"""Counts from shapes: published numbers, three ways to each of them, and the bytes of real files."""

import json
import re

import pytest
from conftest import tiny_llama
from mutants import survives
from safetensors.torch import load_file

import minift
from minift.methods import METHODS
from minift.models.presets import PRESETS, build_preset
from minift.reports import parameters
from minift.training.folder import save_trained

QV = ("q_proj", "v_proj")
ALL = ("all-linear",)
GOLDEN = [
    # the LoRA paper's and PEFT's numbers
    ("llama-2-7b", "lora", {"r": 8, "target_modules": QV}, 4_194_304),
    ("llama-2-7b", "lora", {"r": 16, "target_modules": ALL}, 39_976_960),
    ("llama-2-7b", "lora", {"r": 64, "target_modules": ALL}, 159_907_840),
    ("llama-3-8b", "lora", {"r": 16, "target_modules": ALL}, 41_943_040),
    ("llama-3-8b", "dora", {"r": 16, "target_modules": ALL}, 43_319_296),
    ("llama-3-8b", "lora", {"r": 16, "target_modules": ALL, "modules_to_save": ("lm_head",)}, 567_279_616),
    ("llama-3-8b", "adalora", {"r": 12, "target_modules": QV}, 5_112_576),
    ("llama-2-7b", "ia3", {}, 614_400),
    ("llama-3-8b", "ia3", {}, 524_288),
    ("llama-3-8b", "prompt_tuning", {"num_virtual_tokens": 20}, 81_920),
    ("llama-2-7b", "prefix_tuning", {"num_virtual_tokens": 20}, 5_242_880),
    ("llama-3-8b", "prefix_tuning", {"num_virtual_tokens": 20}, 1_310_720),
    ("gpt2", "lora", {"r": 8, "target_modules": ALL}, 1_179_648),
    ("gpt2", "lora", {"r": 8}, 294_912),  # on the layers that are usual for the family, as in PEFT
    ("bert-base", "lora", {"r": 8}, 294_912),
    ("flan-t5-base", "lora", {"r": 32}, 3_538_944),
    ("gpt2", "ia3", {}, 12 * (3 * 768 + 4 * 768)),  # keys and values are the fused c_attn, as in PEFT
    ("gpt3-175b", "lora", {"r": 1, "target_modules": QV}, 4_718_592),  # "4.7M" in the paper
    ("gpt3-175b", "lora", {"r": 4, "target_modules": QV}, 18_874_368),
    ("gpt3-175b", "lora", {"r": 8, "target_modules": QV}, 37_748_736),
]


@pytest.fixture
def folder(tmp_path):
    minift.save_model(tiny_llama(), tmp_path / "model")
    return tmp_path / "model"


def report(source, method, *arguments, **options) -> dict:
    return json.loads(parameters.params(str(source), method, *arguments, as_json=True, **options))


def value(formula: str) -> int:
    """What a printed formula says: "64 x (16 (4096 + 4096) + 4096)"."""
    product = formula.replace(" x ", " * ")
    return eval(re.sub(r"(\d) \(", r"\1 * (", product))


@pytest.mark.parametrize("preset, name, fields, count", GOLDEN)
def test_law_formula_sites_and_tensors_give_the_published_number(preset, name, fields, count):
    method = METHODS[name](**fields)
    model = build_preset(preset)
    plan = minift.apply(model, method)
    assert method.count(plan) == sum(site.parameters for site in plan.sites) == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert value(parameters.formula(plan)) == count
    rows = parameters.grouped(model)
    assert sum(row.trainable for row in rows) == count
    assert sum(row.file_bytes for row in rows) == 4 * count
    assert sum(row.parameters for row in rows) == plan.total


def test_a_trained_head_counts_in_the_place_of_the_frozen_one():
    method = minift.LoRA(r=16, target_modules=("all-linear",), modules_to_save=("lm_head",))
    plan = method.plan(build_preset("llama-3-8b"))
    assert plan.total == 8_072_204_288
    # PEFT counts the frozen original beside its copy: "all params: 8,597,540,864"
    assert plan.total + 128256 * 4096 == 8_597_540_864


def test_the_figures_of_tutorials():
    assert minift.LoRA().cost(8, 512, 64)[0] == 4_608  # in the place of 32,768
    assert round(100 * (1 - 4_608 / (512 * 64))) == 86
    assert minift.LoRA().cost(8, 4096, 4096)[0] == 65_536


def test_the_report_is_the_law_the_formula_the_table_and_the_known_line():
    said = parameters.params("llama-2-7b", minift.LoRA(r=8, target_modules=QV)).split("\n")
    assert said[0] == "llama-2-7b, lora: sum of r (in + out)"
    assert said[1] == "64 x 8 (4096 + 4096) = 4,194,304"
    assert said[3].split() == ["parameters", "trainable", "stored", "bytes", "file", "bytes"]
    assert [line.split() for line in said[4:7]] == [
        ["base", "6,738,415,616", "0", "13,476,831,232", "0"],
        ["lora", "4,194,304", "4,194,304", "16,777,216", "16,777,216"],
        ["all", "6,742,609,920", "4,194,304", "13,493,608,448", "16,777,216"],
    ]
    assert said[8:] == ["trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"]


NAMES = [name for name in METHODS if name != "bitfit"]  # the tiny Llama has no biases
FIELDS = {"selective": {"last_blocks": 1}, "bottleneck": {"bottleneck_dim": 4}}
VARIANTS = [
    ("lora", {"init": "pissa"}),
    ("lora", {"init": "olora"}),
    ("lora", {"rank_pattern": {"v_proj": 3}, "modules_to_save": ("lm_head",)}),
    ("lora", {"target_modules": ("embed_tokens", "all-linear"), "r": 4}),
    ("selective", {"modules": ("model.norm",)}),
    ("prefix_tuning", {"prefix_projection": True}),
    ("qlora", {"init": "loftq"}),
]
CASES = [(name, FIELDS.get(name, {}), None) for name in NAMES] + [(*case, None) for case in VARIANTS]
CASES += [(name, {}, "nf4") for name in NAMES if name not in ("full", "selective", "bottleneck")]


@pytest.mark.parametrize("name, fields, quantize", CASES)
def test_stored_and_file_bytes_are_those_of_a_real_model_and_its_file(
    folder, tmp_path, name, fields, quantize
):
    method = METHODS[name](**fields)
    recipe = minift.Quantization(quantize) if quantize else getattr(method, "quantization", None)
    said = report(folder, method, recipe)
    model = minift.load_model(folder, "bfloat16", quantize=recipe)
    plan = minift.apply(model, method)
    save_trained(model, tmp_path / "out", "none")
    file = "adapter_model.safetensors" if method.adapter_file else "model/model.safetensors"
    written, stored = load_file(tmp_path / "out" / file).values(), [*model.parameters(), *model.buffers()]
    total = said["rows"][-1]
    assert total["file_bytes"] == sum(t.numel() * t.element_size() for t in written)
    assert total["stored_bytes"] == sum(t.numel() * t.element_size() for t in stored)
    assert (total["parameters"], total["trainable"]) == (plan.total, plan.trainable)
    assert value(said["formula"]) == plan.trainable


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_of_layers_and_of_modules_add_up_to_all(folder, name):
    method = METHODS[name](**FIELDS.get(name, {}))
    recipe = getattr(method, "quantization", None)
    total = report(folder, method, recipe)["rows"][-1]
    virtual = [name] if name in ("prompt_tuning", "p_tuning", "prefix_tuning") else []
    outside = 3 + len(virtual)  # the embedding, the last norm, the head
    for by, count in (("layer", outside + 2), ("module", outside + 2 * 9)):
        *parts, last = report(folder, method, recipe, by=by)["rows"]
        assert last == total and len(parts) == count
        for key in ("parameters", "trainable", "stored_bytes", "file_bytes"):
            assert sum(part[key] for part in parts) == total[key]
    names = [part["name"] for part in report(folder, method, recipe, by="layer")["rows"]]
    blocks = ["model.layers.0", "model.layers.1"]
    assert names == ["model.embed_tokens", *blocks, "model.norm", "lm_head", *virtual, "all"]


def test_quantization_changes_the_bytes_and_no_count():
    method = minift.LoRA(target_modules=QV)
    dense, nf4 = (report("llama-2-7b", method, r) for r in (None, minift.Quantization("nf4")))
    counts = [
        [(r["parameters"], r["trainable"], r["file_bytes"]) for r in said["rows"]] for said in (dense, nf4)
    ]
    assert counts[0] == counts[1]
    saved = 0
    for n, layers in ((4096 * 4096, 128), (4096 * 11008, 96)):  # codes, scales, their scales, an offset
        saved += layers * (2 * n - (n // 2 + n // 64 + 4 * (n // 64 // 256) + 4))
    assert dense["rows"][0]["stored_bytes"] - nf4["rows"][0]["stored_bytes"] == saved


def test_a_dtype_changes_the_bytes_of_the_base_alone():
    rows = [report("smollm2-135m", minift.LoRA(), None, dtype)["rows"] for dtype in ("float32", "float16")]
    assert [row["stored_bytes"] for row in rows[0]][:2] == [4 * 134_515_008, 4 * 460_800]
    assert [row["stored_bytes"] for row in rows[1]][:2] == [2 * 134_515_008, 4 * 460_800]


def test_json_says_what_was_asked():
    said = report("gpt2", minift.LoRA(r=4, target_modules=("c_attn",)), minift.Quantization("int8"))
    assert (said["model"], said["dtype"], said["quantize"]["format"]) == ("gpt2", "bfloat16", "int8")
    assert (said["method"]["name"], said["method"]["r"]) == ("lora", 4)
    assert (said["law"], said["formula"]) == ("sum of r (in + out)", "12 x 4 (768 + 2304)")


def test_a_plan_has_a_row_for_each_module_and_is_the_same_again():
    method = minift.LoRA(
        r=4, alpha=6, rslora=True, target_modules=QV, layers_to_transform=("0-1",), rank_pattern={"v_proj": 1}
    )
    said = parameters.plan_table("smollm2-135m", method)
    head, *rows, total = said.split("\n")
    assert head.split() == ["module", "rule", "r", "alpha", "scaling", "dtype", "base", "parameters"]
    assert [row.split() for row in rows] == [
        [f"model.layers.{i}.self_attn.{name}", name, *numbers]
        for i in (0, 1)
        for name, numbers in (
            ("q_proj", ["4", "6", "3", "float32", "bfloat16", "4,608"]),
            ("v_proj", ["1", "6", "6", "float32", "bfloat16", "768"]),
        )
    ]
    assert total.startswith("trainable params: 10,752 ||")
    assert said == parameters.plan_table("smollm2-135m", method)
    assert "\x1b" not in said and not [line for line in said.split("\n") if line != line.rstrip()]


def test_a_plan_says_what_the_base_is_stored_as(folder):
    def bases(method, recipe=None):
        rows = parameters.plan_table(str(folder), method, recipe).split("\n")[1:-1]
        return {row.split()[0].removeprefix("model.layers.0.self_attn."): row.split()[-2] for row in rows}

    one = minift.LoRA(r=4, target_modules=QV, layers_to_transform=("0",))
    mixed = minift.Quantization("int8", skip=("v_proj",))
    assert bases(one, mixed) == {"q_proj": "int8", "v_proj": "bfloat16"}
    assert set(bases(minift.QLoRA()).values()) == set(bases(minift.QLoRA(init="loftq")).values()) == {"nf4"}
    assert bases(minift.Selective(modules=("model.norm",), head=False)) == {"model.norm.weight": "bfloat16"}
    assert set(bases(minift.Full()).values()) == {"float32"}
    assert set(bases(METHODS["prompt_tuning"]()).values()) == {"-"}


def test_a_4bit_checkpoint_is_planned_and_its_bytes_are_not_guessed(folder, tmp_path):
    minift.save_model(minift.load_model(folder, quantize="nf4"), tmp_path / "small")
    rows = parameters.plan_table(str(tmp_path / "small"), minift.QLoRA()).split("\n")[1:-1]
    assert {row.split()[-2] for row in rows} == {"-"}
    with pytest.raises(ValueError, match="small is a 4-bit checkpoint, and shapes do not say its bytes"):
        parameters.params(str(tmp_path / "small"), minift.LoRA())


NF4, QUERY = minift.Quantization("nf4"), minift.LoRA(target_modules=("query",))
BAD = {
    "by": ({"by": "block"}, "--by 'block' is not one of layer, module"),
    "dtype": ({"dtype": "int8"}, "dtype 'int8' is not one of float32, bfloat16, float16"),
    "preset": ({"source": "llama-2-8b"}, r"no model 'llama-2-8b': give a preset \(nearest: llama-3-8b, "),
    "dead rule": ({"method": QUERY}, r"\['query'\] match no linear layer.*; nearest: \['q_proj'"),
    "frozen": ({"method": minift.Full(), "recipe": NF4}, "needs dense weights"),
    "no head": ({"source": "bert-base", "method": minift.Selective()}, "mean modules without parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_an_error_that_says_what_is_allowed(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        parameters.params(**{"source": "smollm2-135m", "method": minift.LoRA(), **changes})


def check_report(module):
    """Every kind of row: a quantized base, a start beside the factors, a trained tied head, containers."""
    method = minift.LoRA(
        r=4,
        target_modules=("q_proj", "down_proj"),
        modules_to_save=("lm_head", "norm"),
        tied="both",
        init="pissa",
    )
    recipe = minift.Quantization("nf4", skip=("v_proj",))
    said = json.loads(module.params("cut", method, recipe, by="layer", as_json=True))
    rows = {row["name"]: row for row in said["rows"]}
    D, F, kv, V = 3584, 18944, 512, 152064
    block = 2 * D * D + 2 * D * kv + 3 * D * F + D + 2 * kv + 2 * D  # with biases and norms
    added = 4 * (D + D) + 4 * (F + D)
    packed = sum(n // 2 + n // 64 + 4 * -(-n // 64 // 256) + 4 for n in (D * D, D * D, D * kv, *[D * F] * 3))
    stored = packed + 2 * (D * kv + D + 2 * kv + 2 * D) + 8 * added  # v_proj stays dense, in bf16
    assert rows["model.layers.1"] == row("model.layers.1", block + added, added, stored, 8 * added)
    assert rows["model.norm"] == row("model.norm", D, D, 2 * D + 4 * D, 4 * D)
    assert rows["model.embed_tokens"] == row("model.embed_tokens", V * D, V * D, 6 * V * D, 4 * V * D)
    assert rows["lm_head"] == row("lm_head", 0, 0, 0, 4 * V * D)  # a file holds the shared tensor twice
    assert list(rows)[1:4] == ["model.layers.0", "model.layers.1", "model.norm"] and len(rows) == 6
    assert value(said["formula"]) == 2 * added + V * D + D and "2 x 4 (3584" in said["formula"]
    beside = METHODS["bottleneck"](bottleneck_dim=8, placement="parallel")
    rows = {
        row["name"]: row
        for row in json.loads(module.params("cut", beside, by="module", as_json=True))["rows"]
    }
    m = 2 * D * 8 + 8 + D
    assert rows["model.layers.1.mlp"] == row("model.layers.1.mlp", m, m, 4 * m, 4 * m)
    assert "2 x (2 x 3584 x 8 + 8 + 3584) = " in module.params("cut", beside)
    t5 = json.loads(module.params("t5-small", minift.LoRA(target_modules=("q",)), by="layer", as_json=True))
    names = [row["name"] for row in t5["rows"]]
    assert names[1:8] == [*(f"encoder.block.{i}" for i in range(6)), "encoder.final_layer_norm"]
    assert names[8:14] == [f"decoder.block.{i}" for i in range(6)]


def row(name, *numbers) -> dict:
    return parameters.Row(name, *numbers)._asdict()


MUTANTS = [
    ("layer.in_features * layer.out_features", "layer.in_features"),
    ("if p.is_floating_point()) + matrix", ") + matrix"),
    ("t.numel() * t.element_size() for t", "t.numel() for t"),
    ("if t.requires_grad", "if True"),
    ("- replaced\n", "\n"),
    ("_bytes(part.state().values())", "_bytes(own)"),
    ("if id(t) not in seen", "if True"),
    ('not key.startswith("base.")), seen)\n    kept', "True), seen)\n    kept"),
    ('r".*?\\.\\d+(?=\\.)"', 'r".*\\.\\d+"'),
    ("reversed(chain(module))", "()"),
    ('return f"{n} x ({text})" if is_sum else f"{n} x {text}"', "return text"),
    ("if site.parameters\n", "if site.r\n"),
]  # fmt: skip


def test_the_check_passes_on_the_report_and_kills_every_mutant_of_it(monkeypatch):
    monkeypatch.setitem(
        PRESETS, "cut", {**PRESETS["qwen2.5-7b"], "num_hidden_layers": 2, "tie_word_embeddings": True}
    )
    check_report(parameters)
    assert [m for m in MUTANTS if survives(check_report, parameters, *m)] == []
