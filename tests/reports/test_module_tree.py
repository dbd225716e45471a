"""minift inspect: the module tree with exact numbers, and its picture."""

import json

import pytest
import torch
from conftest import tiny_llama

import minift
from minift.cli import main
from minift.models.interface import parameter_count
from minift.models.presets import build_preset
from minift.models.wrappers import bare_modules
from minift.reports.module_tree import describe, module_tree
from minift.reports.plots import plot_tree


def by_path(model):
    return {node.path: node for node in module_tree(model)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", ["", "nf4", "int8"])
def test_the_numbers_of_the_tree_are_those_of_the_tensors(tied, quantize):
    model = tiny_llama(torch.bfloat16, tie_word_embeddings=tied)
    if quantize:
        minift.quantize_model(model, quantize)
    nodes = module_tree(model)
    tops = [node for node in nodes if node.depth == 0]
    assert sum(node.parameters for node in tops) == parameter_count(model)
    tensors = {id(p): p for p in model.parameters()}.values()
    assert sum(node.nbytes for node in tops) == sum(p.numel() * p.element_size() for p in tensors)
    for at, node in enumerate(nodes):  # what a module holds is its own tensors and what its children hold
        below = []
        for other in nodes[at + 1 :]:
            if other.depth <= node.depth:
                break
            below.append(other)
        own = [p for p in model.get_submodule(node.path)._parameters.values() if p is not None]
        children = sum(child.parameters for child in below if child.depth == node.depth + 1)
        if not own:
            assert node.parameters == children


def test_blocks_that_are_alike_are_one_row():
    nodes = by_path(tiny_llama(num_hidden_layers=3))
    assert nodes["model.layers.0"].name == "{0-2}" and nodes["model.layers.0"].copies == 3
    assert "model.layers.1" not in nodes
    q = nodes["model.layers.0.self_attn.q_proj"]
    assert (q.copies, q.shape, q.parameters, q.nbytes) == (3, (32, 32), 3 * 1024, 3 * 4096)


def test_a_block_that_differs_has_a_row_of_its_own():
    model = tiny_llama(num_hidden_layers=4)
    minift.quantize_model(model, "nf4", only=["model.layers.2.*"])
    names = [node.name for node in module_tree(model) if node.path.count(".") == 2 and node.depth == 2]
    assert names == ["{0-1}", "2", "3"]


def test_what_rules_mean_is_marked():
    nodes = by_path(tiny_llama())
    assert nodes["model.layers.0.self_attn.q_proj"].rules == ("all-linear", "q_proj")
    assert nodes["model.layers.0.mlp.down_proj"].rules == ("all-linear", "role ffn_out")
    assert nodes["model.norm"].rules == ("role norms",) and nodes["lm_head"].rules == ()


def test_a_new_head_is_marked(tmp_path):
    minift.save_model(tiny_llama(), tmp_path / "m")
    model = minift.load_model(tmp_path / "m", head="sequence_classification", num_labels=3)
    assert by_path(model)["score"].rules == ("new head",)
    assert "3 labels; new: score" in describe(model).splitlines()[0]


def test_adapters_do_not_change_the_tree():
    model = tiny_llama()
    before = describe(model)
    minift.apply(model, minift.LoRA())
    assert describe(model) == before


def test_a_published_model_from_its_shapes():
    model = build_preset("llama-2-7b")
    last = describe(model).splitlines()[-1]
    assert last == "parameters: 6,738,415,616 || bytes: 26,953,662,464 (25,705.0 MiB)"
    assert {node.path for node in module_tree(model)} < set(bare_modules(model))


def test_the_command(run_folder, capsys):
    assert main(["inspect", "model", "--dtype", "float32"]) == 0
    text = capsys.readouterr().out
    assert "LlamaForCausalLM, head causal_lm" in text and "self_attn" in text
    assert main(["inspect", "model", "--head", "token_classification", "--num-labels", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["modules"]
    assert [row["rules"] for row in rows if row["name"] == "score"] == [["new head"]]
    assert main(["inspect", "llama-2-7b", "--head", "none"]) == 2
    assert "has its published head alone" in capsys.readouterr().err


def test_the_picture_shows_every_large_module(tmp_path):
    pytest.importorskip("matplotlib")
    assert plot_tree(module_tree(tiny_llama()), tmp_path / "tree.png")
    assert (tmp_path / "tree.png").stat().st_size > 5000
    assert not plot_tree([], tmp_path / "none.png") and not (tmp_path / "none.png").exists()
