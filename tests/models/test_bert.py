"""BERT, RoBERTa and DistilBERT beside their formulas: padding, prefixes, positions, masked LMs."""

import copy
import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from tiny import LABELS, SIZES, tiny

import minift
from minift.models import MODELS, bert
from minift.models.interface import Dims

FAMILIES = {"Bert": "bert", "Roberta": "roberta", "DistilBert": "distilbert"}  # name -> trunk
ALL = [name for name in MODELS if name.startswith(tuple(FAMILIES)) and name != "BertForPreTraining"]
# fp64: 2 blocks of 4 products with sums of at most 48 terms, rounded to 2^-53: 8 * 48 * 2^-53 = 4.3e-14 of
# numbers up to about 10 to first order; the factor left is for what norms and softmax amplify.
FP64 = 1e-10


def plain(model, ids: list[int], types: list[int], prefix=()) -> torch.Tensor:
    """Hidden states (T, D) of one text by the formulas, head by head, token by token.

    `prefix` holds keys and values (H, P, hd) of each block.
    """
    w, c = dict(model.bert.named_parameters()), model.config
    D, T = c.hidden_size, len(ids)
    hd, P = D // c.num_attention_heads, prefix[0][0].shape[1] if prefix else 0

    def norm(x, name):
        middle = x - x.mean(-1, keepdim=True)
        rstd = (middle.square().mean(-1, keepdim=True) + c.layer_norm_eps).rsqrt()
        return middle * rstd * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    e = "embeddings"
    words, places, kinds = (w[f"{e}.{n}_embeddings.weight"] for n in ("word", "position", "token_type"))
    x = torch.stack([words[ids[t]] + places[P + t] + kinds[types[t]] for t in range(T)])
    x = norm(x, e)
    for i in range(c.num_hidden_layers):
        at = f"encoder.layer.{i}"
        q, k, v = (linear(x, f"{at}.attention.self.{name}") for name in ("query", "key", "value"))
        out = torch.zeros_like(x)
        for h in range(c.num_attention_heads):
            part = slice(h * hd, (h + 1) * hd)
            keys, values = k[:, part], v[:, part]
            if prefix:
                keys, values = (torch.cat((p[h], y)) for p, y in zip(prefix[i], (keys, values), strict=True))
            for t in range(T):
                out[t, part] = (keys @ q[t, part] / math.sqrt(hd)).softmax(0) @ values
        x = norm(x + linear(out, f"{at}.attention.output.dense"), f"{at}.attention.output")
        z = linear(x, f"{at}.intermediate.dense")
        gelu = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
        x = norm(x + linear(gelu, f"{at}.output.dense"), f"{at}.output")
    return x


TYPED = tiny("BertForSequenceClassification", dtype=torch.float64, layer_norm_eps=1e-2)
IDS = torch.tensor([[5, 9, 33, 8, 71], [0, 0, 6, 1, 2]])
TYPES = torch.tensor([[0, 0, 1, 1, 0], [1, 0, 0, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


@cache
def wanted() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(hidden states, logits) of the texts above, and of the first with type 0 alone."""
    found = []
    for ids, types in (
        ([5, 9, 33, 8, 71], [0, 0, 1, 1, 0]),
        ([6, 1, 2], [0, 1, 1]),
        ([5, 9, 33, 8, 71], [0] * 5),
    ):
        hidden = plain(TYPED, ids, types)
        pooled = (hidden[0] @ TYPED.bert.pooler.dense.weight.T + TYPED.bert.pooler.dense.bias).tanh()
        found.append((hidden, pooled @ TYPED.classifier.weight.T + TYPED.classifier.bias))
    return found


def check_forward(module):
    """Two texts of different lengths in one batch, with tokens of both types; one alone, without types."""
    config = module.BertConfig(**{**SIZES["Bert"], "layer_norm_eps": 1e-2})
    model = module.Bert(config, TYPED.head_kind, LABELS).double().eval()
    model.load_state_dict(TYPED.state_dict())
    given = {"attention_mask": MASK, "token_type_ids": TYPES}
    with torch.no_grad():
        hidden, logits = model.backbone(IDS, **given), model(IDS, **given)
        alone = model.backbone(IDS[:1])[0], model(IDS[:1])[0]
    got = [(hidden[0], logits[0]), (hidden[1, 2:], logits[1]), alone]
    for pair, want in zip(got, wanted(), strict=True):
        torch.testing.assert_close(pair, want, rtol=0, atol=FP64)


MUTANTS = [
    ('"gelu": F.gelu', '"gelu": partial(F.gelu, approximate="tanh")'),
    ("x = words + self.position_embeddings(position_ids)", "x = words"),
    ("default_positions(attention_mask, x", "default_positions(None, x"),
    ("types[:, types.shape[1] - token_type_ids.shape[1] :] = token_type_ids", "types[:] = 0"),
    ("return self.LayerNorm(x)", "return x"),
    ("x = norm_1(x + o(", "x = norm_2(x + o("),
    ("x = norm_1(x + o(self.mix(q(x), k(x), v(x), mask, prefix)))",
     "x = x + o(self.mix(q(norm_1(x)), k(norm_1(x)), v(norm_1(x)), mask, prefix))"),
    ("self.mix(q(x), k(x), v(x)", "self.mix(k(x), q(x), v(x)"),
    ("return norm_2(x + ffn_out", "return norm_2(ffn_out"),
    ("causal=False", "causal=True"),
    ("mask = attend_everywhere(attention_mask)", "mask = None"),
    ("layer = nn.LayerNorm(D, eps)", "layer = nn.LayerNorm(D, 1e-3)"),
    ("self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)", "self.LayerNorm = nn.LayerNorm(D, 1e-12)"),
    ("squash: ClassVar = staticmethod(torch.tanh)", "squash: ClassVar = staticmethod(F.relu)"),
    ("first = hidden[rows, attention_mask.long().argmax(dim=-1)]", "first = hidden[:, 0]"),
]  # fmt: skip


def test_the_forward_is_that_of_the_formulas_and_every_mutant_is_not():
    check_forward(bert)
    assert [m for m in MUTANTS if survives(check_forward, bert, *m)] == []


@given(st.sampled_from(ALL), st.integers(1, 6), st.integers(0, 5), st.booleans())
def test_padding_on_either_side_changes_no_output(name, length, pad, left):
    model = tiny(name, dtype=torch.float64)
    ids = torch.randint(97, (1, length), generator=torch.Generator().manual_seed(length))
    parts = (torch.full((1, pad), 5), ids), (torch.zeros(1, pad), torch.ones(1, length))
    padded, mask = (torch.cat(p if left else p[::-1], dim=1) for p in parts)
    got, want = model(padded, attention_mask=mask), model(ids)
    if got.dim() == 3:
        got = got[:, mask[0].bool()]
    torch.testing.assert_close(got, want, rtol=0, atol=FP64)


def test_a_text_without_a_real_token_gives_numbers_and_gradients():
    model = tiny("BertForSequenceClassification")
    mask = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    model(torch.tensor([[5, 9, 33, 8], [5, 9, 33, 8]]), attention_mask=mask).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_every_token_sees_those_behind_it():
    model = tiny("BertModel")
    a, b = model(torch.tensor([[5, 9, 33, 8]])), model(torch.tensor([[5, 9, 33, 7]]))
    assert (a != b).any(dim=-1).all()


def test_a_given_prefix_stands_before_the_text_and_moves_its_positions():
    prefix = torch.randn(2, 2, 1, 4, 3, 8, dtype=torch.float64)  # blocks, keys and values, for all texts
    got = TYPED.backbone(IDS, attention_mask=MASK, token_type_ids=TYPES, prefix_kv=[tuple(p) for p in prefix])
    for row, real in enumerate(MASK.bool()):
        ids, types = IDS[row, real].tolist(), TYPES[row, real].tolist()
        want = plain(TYPED, ids, types, [tuple(p[:, 0]) for p in prefix])
        torch.testing.assert_close(got[row, real], want, rtol=0, atol=FP64)


def test_a_soft_prompt_of_real_tokens_is_these_tokens_with_type_0():
    model = copy.deepcopy(TYPED)
    minift.apply(model, minift.PromptTuning(num_virtual_tokens=2, init="text", init_ids=(7, 8)))
    got = model.backbone(IDS, attention_mask=MASK, token_type_ids=TYPES)
    for row, real in enumerate(MASK.bool()):
        ids, types = IDS[row, real].tolist(), TYPES[row, real].tolist()
        want = plain(TYPED, [7, 8, *ids], [0, 0, *types])[2:]
        torch.testing.assert_close(got[row, real], want, rtol=0, atol=FP64)


def test_a_text_longer_than_the_positions_says_so_and_padding_does_not_count():
    for name, most in (("BertModel", 8), ("RobertaModel", 6)):  # RoBERTa's first two are of padding
        model = tiny(name, max_position_embeddings=8)
        assert model.dims.context == most
        with pytest.raises(
            ValueError, match=f"a text has {most + 1} tokens.* {most} positions .max_position"
        ):
            model(torch.zeros(1, most + 1, dtype=torch.long))
        mask = torch.tensor([[0, 0, 0] + [1] * most])
        assert torch.isfinite(model(torch.zeros(1, most + 3, dtype=torch.long), attention_mask=mask)).all()


def test_dims_are_those_of_the_config():
    for family, context in (("Bert", 64), ("Roberta", 62), ("DistilBert", 64)):
        assert tiny(f"{family}Model").dims == Dims(2, 32, 4, 8, 97, context)


def test_an_encoder_has_no_cache():
    with pytest.raises(ValueError, match="BertForMaskedLM reads whole texts at once and has no KV cache"):
        tiny("BertForMaskedLM").new_cache(1, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_lm_ends_in_the_embedding_and_a_bias_of_its_own(family):
    tied, untied = (tiny(f"{family}ForMaskedLM", tie_word_embeddings=tie) for tie in (True, False))
    assert tied.tied and tied.head.weight is tied.embed_weight and not untied.tied
    assert tied.head.bias.shape == (97,)
    hidden = tied.backbone(IDS)
    want = hidden @ tied.embed_weight.T + tied.head.bias
    torch.testing.assert_close(tied(IDS), want)
    assert len(dict(untied.named_parameters())) == len(dict(tied.named_parameters())) + 1
