"""Rules to layers."""

import pytest
from conftest import tiny_llama

from minift.models.targets import ALL_LINEAR, match, parse_layers


def paths(*rules, **keywords):
    return list(match(tiny_llama(num_hidden_layers=3), rules, **keywords))


def test_names_globs_whole_paths_and_all_linear():
    assert paths("q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert paths("self_attn.q_proj") == paths("q_proj")
    assert paths("model.layers.1.mlp.up_proj") == ["model.layers.1.mlp.up_proj"]
    assert paths("model.layers.[01].mlp.*_proj") == [
        f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")
    ]
    assert len(paths(ALL_LINEAR)) == 3 * 7 and len(paths(ALL_LINEAR, "lm_head")) == 3 * 7 + 1


def test_the_first_rule_that_fits_is_named():
    found = match(tiny_llama(), ["*.q_proj", ALL_LINEAR])
    assert found["model.layers.0.self_attn.q_proj"] == "*.q_proj"
    assert found["model.layers.0.self_attn.k_proj"] == ALL_LINEAR


def test_a_name_is_a_whole_word():
    with pytest.raises(ValueError, match="match no linear layer"):
        paths("proj")


def test_excludes_and_layer_ranges():
    assert paths(ALL_LINEAR, exclude_modules=["*.mlp.*"]) == [
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qkvo"
    ]
    assert paths("v_proj", layers=["0", "2"]) == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert paths("v_proj", layers=["1-2"]) == [
        "model.layers.1.self_attn.v_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert parse_layers((), 3) is None and parse_layers((1, "0-1"), 3) == {0, 1}


@pytest.mark.parametrize(
    "rules, keywords, message",
    [
        (["query"], {}, r"target_modules \['query'\] match no linear layer; nearest: .*'q_proj'"),
        (["q_proj", "vproj"], {}, r"\['vproj'\].*'v_proj'"),
        (["q_proj"], {"exclude_modules": ["w1"]}, r"exclude_modules \['w1'\] match no linear layer"),
        (["q_proj"], {"exclude_modules": ["q_proj"]}, "leave out"),
        (["lm_head"], {"layers": ["0"]}, "leave out"),
        (["q_proj"], {"layers": ["2-5"]}, "outside the blocks 0-2"),
        (["q_proj"], {"layers": ["x"]}, "neither a block number nor a range"),
        ([], {}, "target_modules is empty"),
    ],
)
def test_a_rule_that_means_nothing_is_an_error(rules, keywords, message):
    with pytest.raises(ValueError, match=message):
        paths(*rules, **keywords)
