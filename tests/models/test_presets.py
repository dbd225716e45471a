"""Presets: published totals, the names and shapes of transformers, and what methods ask a model for."""

from functools import cache

import pytest
import torch
from mutants import survives
from torch import nn

import minift
from minift.load import build_model
from minift.models import skeleton
from minift.models.config import LARGEST
from minift.models.gpt2 import GPT2Config
from minift.models.interface import parameter_count
from minift.models.presets import PRESETS, build_preset
from minift.models.targets import fits, match
from minift.models.wrappers import bare_modules

# Parameters of the published checkpoints, a tied weight once (BERT: `bert` with its pooler).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_604_259_328,  # the paper says 175.0B; the sum is checked below
    "bert-base": 109_482_240,
    "bert-large": 335_141_888,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
}


EXPECTED_DIMS = {  # blocks, D, KV, hd, V, context
    "gpt2": (12, 768, 12, 64, 50257, 1024),
    "gpt3-175b": (96, 12288, 96, 128, 50257, 2048),
    "bert-base": (12, 768, 12, 64, 30522, 512),
    "t5-small": (6, 512, 8, 64, 32128, LARGEST),  # relative positions end nowhere
    "flan-t5-small": (8, 512, 6, 64, 32128, LARGEST),
    "qwen2.5-0.5b": (24, 896, 2, 64, 151936, 32768),
}
USUAL = {
    "gpt2": ["c_attn"],
    "gpt3-175b": ["q_proj", "v_proj"],
    "bert-base": ["query", "value"],
    "flan-t5-small": ["q", "v"],
    "smollm2-135m": ["q_proj", "v_proj"],
    "mistral-7b": ["q_proj", "v_proj"],
    "qwen2.5-0.5b": ["q_proj", "v_proj"],
}


@pytest.fixture(scope="module")
def built():
    return cache(build_preset)


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def test_every_preset_has_a_published_total():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters_and_no_weights(built, name):
    model = built(name)
    assert parameter_count(model) == PUBLISHED[name]
    assert all(p.is_meta for p in model.parameters()) and model.source == name


def test_gpt3_is_the_sum_of_its_parts_and_the_175_billion_of_the_paper():
    L, D, V, context = 96, 12288, 50257, 2048
    block = 12 * D * D + 13 * D  # q, k, v, o, two of 4 D x D; biases 4 D + 4 D + D, two norms of 2 D
    assert PUBLISHED["gpt3-175b"] == V * D + context * D + L * block + 2 * D
    assert round(PUBLISHED["gpt3-175b"] / 1e9) == 175


def meant(model, role, paths=None) -> list[str]:
    """The paths that a role's rules mean."""
    return [p for p in paths or bare_modules(model) if any(fits(p, rule) for rule in model.sites[role])]


@pytest.mark.parametrize("name", [*EXPECTED_DIMS, "llama-3-8b", "mistral-7b", "smollm2-135m"])
def test_what_methods_ask_a_model_for_agrees_with_its_tree(built, name):
    model, dims, modules = built(name), built(name).dims, bare_modules(built(name))
    assert dims == EXPECTED_DIMS.get(name, dims) and len(model.blocks) == dims.blocks
    assert tuple(model.embed.weight.shape) == (dims.vocab, dims.hidden)
    shared = sum(p.numel() for _, p in model.named_parameters(remove_duplicate=False)) - PUBLISHED[name]
    assert shared == (dims.vocab * dims.hidden if model.tied else 0)
    for role in ("k", "v", "ffn_out", "ffn_in", "attn_out"):
        paths = meant(model, role, modules)
        assert all(isinstance(modules[p], nn.Linear) for p in paths)
        assert {model.block_index(p) for p in paths} == set(range(dims.blocks))
    assert {type(modules[p]).__name__ for p in meant(model, "norms")} <= {"LayerNorm", "RMSNorm"}
    width = modules[meant(model, "k")[0]].out_features
    assert width == dims.kv_heads * dims.head_dim * (3 if "attn.c_attn" in model.sites["k"] else 1)


def test_the_fused_projection_of_gpt2_stays_one_layer_and_that_of_gpt3_is_split(built):
    gpt2, gpt3 = built("gpt2"), built("gpt3-175b")
    assert gpt2.sites["k"] == gpt2.sites["v"] == ("attn.c_attn",)
    assert tuple(gpt2.get_submodule("transformer.h.11.attn.c_attn").weight.shape) == (2304, 768)
    assert (gpt3.sites["k"], gpt3.sites["v"]) == (("attn.k_proj",), ("attn.v_proj",))
    assert len(meant(gpt3, "k") + meant(gpt3, "v")) == 2 * 96


def test_the_feed_forward_output_of_bert_is_not_the_attention_output(built):
    found = meant(built("bert-base"), "ffn_out")
    assert found == [f"bert.encoder.layer.{i}.output.dense" for i in range(12)]


def test_a_block_number_of_t5_means_that_block_of_both_stacks(built):
    model = built("t5-small")
    found = list(match(model, ["v"], layers=["3"]))
    assert found == [
        "encoder.block.3.layer.0.SelfAttention.v",
        "decoder.block.3.layer.0.SelfAttention.v",
        "decoder.block.3.layer.1.EncDecAttention.v",
    ]
    assert model.block_index("shared") is model.block_index("encoder.final_layer_norm") is None
    biases = [name for name in shapes(model) if "relative_attention_bias" in name]
    assert biases == [f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for side in
                      ("encoder", "decoder")]  # fmt: skip


def test_gpt3_has_no_forward_and_says_so(built):
    with pytest.raises(ValueError, match="gpt3-175b has no forward here; it plans and counts"):
        built("gpt3-175b")(torch.zeros(1, 3, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("name, targets", USUAL.items())
def test_lora_goes_to_the_usual_layers_of_a_family(built, name, targets):
    model = built(name)
    paths = [site.path for site in minift.LoRA().plan(model).sites]
    assert {path.rpartition(".")[2] for path in paths} == set(targets)
    assert {model.block_index(path) for path in paths} == set(range(model.dims.blocks))


def test_an_unknown_preset_is_an_error_with_its_nearest():
    with pytest.raises(ValueError, match="no preset 'Llama-3-7b'; nearest: llama-3-70b, llama-3-8b"):
        build_preset("Llama-3-7b")
    with pytest.raises(ValueError, match="no preset 'zzz'; nearest: gpt2, gpt2-medium, .*qwen2.5-7b$"):
        build_preset("zzz")


def test_the_real_smollm2_has_the_shapes_of_its_preset(built, smollm2_path):
    assert shapes(build_model(smollm2_path)) == shapes(built("smollm2-135m"))


KINDS = {
    "GPT2LMHeadModel": "gpt2",
    "BertModel": "bert",
    "T5ForConditionalGeneration": "t5",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_names_and_shapes_are_those_of_transformers(built, kind):
    transformers = pytest.importorskip("transformers")
    names = [name for name, config in PRESETS.items() if config["architectures"] == [kind]]
    for name in (names[0], names[-1]):  # the smallest and the largest; the others by their totals
        config = transformers.AutoConfig.for_model(**{"model_type": KINDS[kind], **PRESETS[name]})
        with skeleton.shapes_only():
            theirs = shapes(getattr(transformers, kind)(config))
        ours = {key.removeprefix("bert."): shape for key, shape in shapes(built(name)).items()}
        if kind == "GPT2LMHeadModel":  # whose Conv1D holds (in, out)
            theirs = {key: shape[::-1] if ".c_" in key else shape for key, shape in theirs.items()}
        copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # T5: of `shared`
        assert ours == {key: shape for key, shape in theirs.items() if key not in copies}, name


def check_gpt3(module):
    """Totals, names and what methods ask for, cut to two blocks."""
    with module.shapes_only():
        model = module.GPT3(GPT2Config.from_hf({**PRESETS["gpt3-175b"], "n_layer": 2}))
    assert parameter_count(model) == PUBLISHED["gpt3-175b"] - 94 * (12 * 12288**2 + 13 * 12288)
    assert all(p.is_meta for p in model.parameters())
    assert [len(meant(model, role)) for role in ("k", "v", "attn_out", "ffn_in")] == [2] * 4
    names = [path.rpartition(".")[2] for role in ("k", "v") for path in meant(model, role)]
    assert names == ["k_proj", "k_proj", "v_proj", "v_proj"]


MUTANTS = [
    ("nn.Linear(D, D)", "nn.Linear(D, 3 * D)"),
    ("nn.Linear(D, D)", "nn.Linear(D, D, bias=False)"),
    ('for name in "qkv"', 'for name in "qk"'),
    (', "c_proj": block.attn.c_proj', ""),
    ('"k": ("attn.k_proj",)', '"k": ("attn.q_proj",)'),
    ('"v": ("attn.v_proj",)', '"v": ("attn.k_proj",)'),
    ("in self.blocks:", "in self.blocks[1:]:"),
]


def test_the_check_passes_on_gpt3_and_kills_every_mutant_of_it():
    check_gpt3(skeleton)
    assert [m for m in MUTANTS if survives(check_gpt3, skeleton, *m)] == []
