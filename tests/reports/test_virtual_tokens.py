"""The tokens nearest to a learned prompt."""

from unittest.mock import patch

import pytest
import torch
from conftest import tiny_llama
from mutants import survives

import minift
from minift.reports import virtual_tokens
from minift.reports.virtual_tokens import Near, nearest_tokens


def prompted(method, dtype=torch.float32):
    model = tiny_llama(dtype)
    minift.apply(model, method)
    return model


class Spelled:
    """A tokenizer that spells an id, and hides special ids unless it is asked for them."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join("" if skip_special_tokens and i < 2 else f"<{i}>" for i in ids)


def check(module):
    """Every cosine equals the one computed in fp64, token by token, and the order is that of the cosines."""
    for method, dtype in (
        (minift.PromptTuning(num_virtual_tokens=3, init="random"), torch.float32),
        (minift.PromptTuning(num_virtual_tokens=3, init="random"), torch.bfloat16),
        (minift.PTuning(num_virtual_tokens=2, encoder="lstm"), torch.float32),
    ):
        model = prompted(method, dtype)
        P, E = model.slots[0].prompt().detach().double(), model.embed_weight.double()
        with patch.object(module, "ROWS", 10):  # 97 tokens in ten pieces, the last one shorter
            rows = module.nearest_tokens(model, Spelled(), k=97)
        assert len(rows) == 97 * len(P)
        for at, p in enumerate(P):
            mine = [row for row in rows if row.position == at]
            assert rows[at * 97 : at * 97 + 97] == mine and {row.token for row in mine} == set(range(97))
            for row in mine:
                want = (p @ E[row.token] / (p.norm() * E[row.token].norm())).item()
                # two norms and a product of 32 terms in fp32: (3 * 32 + 4) * 2^-24 of |p| |e|
                assert abs(row.cosine - want) <= 100 * 2.0**-24 and row.text == f"<{row.token}>"
            assert [row.cosine for row in mine] == sorted((row.cosine for row in mine), reverse=True)
        few = module.nearest_tokens(model, Spelled(), k=2)
        assert few == [row for at in range(len(P)) for row in rows[at * 97 : at * 97 + 2]]


def test_cosines_and_order_are_the_definition():
    check(virtual_tokens)


@pytest.mark.parametrize(
    "old, new",
    [
        ("F.normalize(prompt.float(), dim=1)", "prompt.float()"),
        ("F.normalize(prompt.float(), dim=1)", "F.normalize(prompt.float(), dim=0)"),
        ("F.normalize(e.float(), dim=1).t()", "e.float().t()"),
        ("F.normalize(e.float(), dim=1).t()", "F.normalize(e, dim=1).float().t()"),
        ("found = cosines.topk(k, dim=1)", "found = cosines.topk(k, dim=1, largest=False)"),
        ("found = cosines.topk(k, dim=1)", "found = cosines.abs().topk(k, dim=1)"),
        ("for e in E.split(ROWS)], 1)", "for e in E.split(ROWS)[::-1]], 1)"),
        ("model.embed_weight  #", "model.head.weight  #"),
        ("skip_special_tokens=False", "skip_special_tokens=True"),
        ("for position, row in enumerate(zip", "for position, row in enumerate(start=1, iterable=zip"),
    ],
)
def test_mutants_are_noticed(old, new):
    assert not survives(check, virtual_tokens, old, new)


def test_a_prompt_that_starts_as_a_text_is_nearest_to_its_tokens(tokenizer):
    method = minift.PromptTuning(num_virtual_tokens=4, init="text", init_text="Sum:").with_tokenizer(
        tokenizer
    )
    rows = nearest_tokens(prompted(method), tokenizer, k=1)
    assert "".join(row.text for row in rows) == "Sum:"
    # a cosine of two equal vectors: the bound of `check`
    assert all(isinstance(row, Near) and abs(row.cosine - 1) <= 100 * 2.0**-24 for row in rows)


def test_the_table_has_a_line_for_each_virtual_token(tokenizer):
    method = minift.PromptTuning(num_virtual_tokens=2, init="text", init_ids=(35, 36))
    lines = str(nearest_tokens(prompted(method), tokenizer, k=3)).split("\n")
    assert lines[0] == "position  nearest tokens and their cosine" and len(lines) == 3
    assert lines[1].startswith("       0  'A' 1.000  '") and lines[2].startswith("       1  'B' 1.000  '")


def test_what_has_no_prompt_says_so(tokenizer):
    model = prompted(minift.PrefixTuning(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="'default' is prefix_tuning, which has no prompt embeddings"):
        nearest_tokens(model, tokenizer)
    minift.apply(model, minift.LoRA(r=2), name="branch")
    with pytest.raises(ValueError, match="'branch' is lora, which has no prompt embeddings"):
        nearest_tokens(model, tokenizer, "branch")
    with pytest.raises(ValueError, match=r"no adapter named 'x'; resident: \['branch', 'default'\]"):
        nearest_tokens(model, tokenizer, "x")
    model = prompted(minift.PromptTuning(num_virtual_tokens=2))
    for k in (0, 98, 1.0, True):
        with pytest.raises(ValueError, match=f"k is {k}; it is a number of tokens from 1 to 97"):
            nearest_tokens(model, tokenizer, k=k)
