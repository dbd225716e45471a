"""T5 beside its formulas: buckets, forward, padding, cache, heads, virtual tokens."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives
from tiny import tiny

import minift
from minift.models import MODELS, layers, t5
from minift.models.config import LARGEST
from minift.models.t5 import T5, bucket

LM = "T5ForConditionalGeneration"
# fp64: 5 layers of products with sums of at most 48 terms, rounded to 2^-53: 5 * 48 * 2^-53 = 3e-14 of
# numbers up to about 100; the factor left is for what norms and softmax amplify.
FP64 = 1e-10
IDS = torch.tensor([[4, 8, 15, 16, 1], [23, 42, 1, 0, 0], [0, 0, 9, 7, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1]])
TEXTS = [[4, 8, 15, 16, 1], [23, 42, 1], [9, 7, 1]]  # the same
WRITTEN = torch.tensor([[0, 5, 6, 90], [0, 91, 3, 2], [0, 9, 9, 9]])
FIELDS = [
    {},
    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "scale_decoder_outputs": False},
]


def exact_bucket(distance: int, buckets: int, farthest: int, causal: bool) -> tuple[int, float]:
    """The entry in whole numbers, and how far ln(d / near) / ln(farthest / near) * (n - near) is from one."""
    n = buckets if causal else buckets // 2
    d, behind = (max(-distance, 0), 0) if causal else (abs(distance), n * (distance > 0))
    near = n // 2
    if d < near:
        return behind + d, 1.0
    far = n - near
    turns = 0
    while turns < far - 1 and d**far >= farthest ** (turns + 1) * near ** (far - turns - 1):
        turns += 1
    value = math.log(d / near) / math.log(farthest / near) * far
    return behind + near + turns, abs(value - round(value))


def check_buckets(module):
    for causal in (True, False):
        for buckets, farthest in ((32, 128), (8, 20), (5, 17)):
            want = [exact_bucket(d, buckets, farthest, causal)[0] for d in range(-300, 301)]
            got = module.bucket(torch.arange(-300, 301), buckets, farthest, causal)
            assert got.tolist() == want


BUCKET_MUTANTS = [
    ("n = buckets if causal else buckets // 2", "n = buckets // 2"),
    ("d = (-distance).clamp(min=0) if causal", "d = distance.clamp(min=0) if causal"),
    ("near = n // 2", "near = n // 2 + 1"),
    ("torch.where(d < near", "torch.where(d < near - 1"),
    ("math.log(farthest / near)", "math.log(farthest)"),
    ("turns * (n - near)", "turns * near"),
    (".clamp(max=n - 1))", ".clamp(max=n - 2))"),
    ("far.clamp(max=n - 1)", "far"),
    ("found + n * (distance > 0)", "found + n * (distance >= 0)"),
    ("found + n * (distance > 0)", "found + n * (distance < 0)"),
]  # fmt: skip


def test_the_buckets_are_those_of_the_paper_and_every_mutants_are_not():
    check_buckets(t5)
    assert [m for m in BUCKET_MUTANTS if survives(check_buckets, t5, *m)] == []


@given(st.integers(4, 64), st.integers(1, 300), st.booleans(), st.integers(-700, 700))
def test_a_bucket_is_that_of_whole_numbers_but_on_the_border_of_two(buckets, more, causal, distance):
    farthest = buckets // 2 + more
    got = int(bucket(torch.tensor(distance), buckets, farthest, causal))
    want, margin = exact_bucket(distance, buckets, farthest, causal)
    n = buckets if causal else buckets // 2
    # ln of a ratio rounded to 2^-24, then three roundings of a value up to n, which only matter below the cap
    error = 2.0**-24 * (n / math.log(farthest / (n // 2)) + 4 * n)
    assert got == want or (abs(got - want) == 1 and margin <= error)


def plain(model, text: list[int], written: list[int]) -> torch.Tensor:
    """The decoder's states (T, D) by the formulas, head by head, token by token."""
    w, c = dict(model.named_parameters()), model.config
    w |= {name.removeprefix("transformer."): p for name, p in w.items()}

    def norm(x, name):
        rstd = (x.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).rsqrt()
        return x * rstd * w[f"{name}.layer_norm.weight"]

    def attend(x, source, name, table=None, causal=False):
        parts = {part: w[f"{name}.{part}.weight"] for part in "qkvo"}
        out = x.new_zeros(len(x), c.num_heads * c.d_kv)
        for h in range(c.num_heads):
            own = slice(h * c.d_kv, (h + 1) * c.d_kv)
            k, v = source @ parts["k"][own].T, source @ parts["v"][own].T
            for t in range(len(x)):
                scores = k @ (parts["q"][own] @ x[t])
                for s in range(len(source)) if table is not None else ():
                    row, _ = exact_bucket(s - t, len(table), c.relative_attention_max_distance, causal)
                    scores[s] = scores[s] + table[row, h] if s <= t or not causal else -math.inf
                out[t, own] = scores.softmax(0) @ v
        return out @ parts["o"].T

    def stack(name, x, blocks, states=None):
        table = w[f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        for i in range(blocks):
            at = f"{name}.block.{i}.layer"
            h = norm(x, f"{at}.0")
            x = x + attend(h, h, f"{at}.0.SelfAttention", table, states is not None)
            if states is not None:
                x = x + attend(norm(x, f"{at}.1"), states, f"{at}.1.EncDecAttention")
            last = f"{at}.{1 if states is None else 2}"
            h, ffn = norm(x, last), f"{last}.DenseReluDense"
            if c.gated:
                z = h @ w[f"{ffn}.wi_0.weight"].T
                gelu = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
                inner = gelu * (h @ w[f"{ffn}.wi_1.weight"].T)
            else:
                inner = (h @ w[f"{ffn}.wi.weight"].T).clamp(min=0)
            x = x + inner @ w[f"{ffn}.wo.weight"].T
        rstd = (x.square().mean(-1, keepdim=True) + c.layer_norm_epsilon).rsqrt()
        return x * rstd * w[f"{name}.final_layer_norm.weight"]

    states = stack("encoder", w["shared.weight"][text], c.num_layers)
    return stack("decoder", w["shared.weight"][written], c.num_decoder_layers, states)


@cache
def expected(i: int):
    """The model of FIELDS[i] and, for each of TEXTS, its logits by the formulas."""
    fields = FIELDS[i]
    model = tiny(LM, dtype=torch.float64, num_decoder_layers=3, **fields)
    c = model.config
    scale = c.d_model**-0.5 if c.scale_decoder_outputs else 1.0
    with torch.no_grad():
        found = [plain(model, *both) for both in zip(TEXTS, WRITTEN.tolist(), strict=True)]
        return model, torch.stack(found) * scale @ model.head.weight.T


def in_pieces(model, cache):
    """The logits of the batch, read in three pieces between which its rows change places, as beams do."""
    rows, found = torch.arange(3), []
    for start, stop, places in ((0, 2, [2, 0, 1]), (2, 3, [0, 1, 2]), (3, 4, [0, 1, 2])):
        encoded = {"input_ids": IDS[rows], "attention_mask": MASK[rows]}
        logits = model(**encoded, decoder_input_ids=WRITTEN[rows, start:stop], cache=cache)
        found.append(logits[rows.argsort()])
        cache.reorder(torch.tensor(places))
        rows = rows[places]
    return torch.cat(found, dim=1)


def check_cache(module):
    model, want = expected(0)
    with torch.no_grad():
        read = in_pieces(model, module.CrossCache(3, 4, model.dims, model.dtype, model.device))
    torch.testing.assert_close(read, want, rtol=0, atol=FP64)


CACHE_MUTANTS = [
    ("[(k[rows], v[rows]) for k, v in self.encoded]", "[(k, v[rows]) for k, v in self.encoded]"),
    ("[(k[rows], v[rows]) for k, v in self.encoded]", "[(k[rows], v) for k, v in self.encoded]"),
    ("None if self.seen is None else self.seen[rows]", "self.seen"),
    ("super().reorder(rows)", "pass"),
    ("torch.equal(texts, before)", "torch.equal(texts, texts)"),
]


def check_forward(module):
    """A padded batch at once, with gradients and without, and in pieces through the cache."""
    for i in range(len(FIELDS)):
        weights, want = expected(i)
        model = module.T5(module.T5Config(**vars(weights.config))).double().eval()
        model.load_state_dict(weights.state_dict())
        encoded = {"input_ids": IDS, "attention_mask": MASK}
        trained = model(**encoded, decoder_input_ids=WRITTEN)
        trained.sum().backward()
        for stack in (model.encoder, model.decoder):
            table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            assert table.grad is not None and table.grad.any()
        with torch.no_grad():
            got = model(**encoded, decoder_input_ids=WRITTEN)
            read = in_pieces(model, model.new_cache(3, 4))
        for logits in (trained.detach(), got, read):
            torch.testing.assert_close(logits, want, rtol=0, atol=FP64)


MUTANTS = [
    ("torch.arange(1 - S, T,", "torch.arange(2 - S, T + 1,"),
    (".unfold(1, S, 1).flip(1)", ".unfold(1, S, 1)"),
    ("Attention(config, positions=index == 0, causal=decodes)", "Attention(config, positions=index == 0)"),
    ("scores if bias is None else scores + bias", "scores"),
    ("attn_mask=bias, scale=1.0", "attn_mask=bias"),
    ("attn_mask=bias, scale=1.0", "scale=1.0"),
    ("~seen, torch.finfo", "seen, torch.finfo"),
    ("x = x + own.SelfAttention(h, k, v, bias)", "x = x + own.SelfAttention(x, k, v, bias)"),
    ("other.layer_norm(x), k, v, cross", "other.layer_norm(x), k, v, None"),
    ("x + last.DenseReluDense(last.layer_norm(x))", "last.DenseReluDense(last.layer_norm(x))"),
    ('approximate="tanh"', 'approximate="none"'),
    ("self.wo(F.relu(", "self.wo(F.gelu("),
    ("return stack.final_layer_norm(x), seen", "return x, seen"),
    ("x = self.root.decoder.final_layer_norm(x)", ""),
    ("self.config.d_model**-0.5", "self.config.d_kv**-0.5"),
    ("kv, seen = cache.encoded, cache.seen", "kv, seen = cache.encoded, None"),
    ("S = T if cache is None else cache.length + T", "S = T"),
    ("if seen is None and T > 1:", "if False:"),
    ("cache.advance(x.shape[1])", "pass"),
]  # fmt: skip


def test_the_forward_is_that_of_the_formulas_and_every_mutant_is_not():
    check_forward(t5)
    assert [m for m in MUTANTS if survives(check_forward, t5, *m)] == []


def test_rows_of_the_cache_change_places_and_no_mutants_do():
    check_cache(layers)
    assert [m for m in CACHE_MUTANTS if survives(check_cache, layers, *m)] == []


@given(st.integers(0, 4), st.integers(0, 3))
def test_left_padding_of_encoder_and_decoder_changes_no_logit(pad, behind):
    model = tiny(LM, dtype=torch.float64)
    ids = torch.cat((torch.full((1, pad), 7), IDS[:1], torch.full((1, behind), 7)), dim=1)
    mask = torch.cat((torch.zeros(1, pad), MASK[:1], torch.zeros(1, behind)), dim=1)
    written = torch.cat((torch.full((1, behind), 7), WRITTEN[:1]), dim=1)
    real = torch.cat((torch.zeros(1, behind), torch.ones(1, 4)), dim=1)
    with torch.no_grad():
        want = model(IDS[:1], decoder_input_ids=WRITTEN[:1])
        got = model(ids, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=real)
    torch.testing.assert_close(got[:, behind:], want, rtol=0, atol=FP64)


@pytest.mark.parametrize("start", [0, 5])
@pytest.mark.parametrize("head", ["sequence_classification", "question_answering", "token_classification"])
def test_a_head_on_its_own_input_does_not_see_padding(head, start):
    name = next(n for n, entry in MODELS.items() if entry[0] is T5 and entry[2] == head)
    model = tiny(name, dtype=torch.float64, decoder_start_token_id=start)
    got = model(IDS, attention_mask=MASK)
    for row, text in enumerate(TEXTS):
        want, real = model(torch.tensor([text])), MASK[row].bool()
        found = got[row : row + 1] if head == "sequence_classification" else got[row : row + 1, real]
        torch.testing.assert_close(found, want, rtol=0, atol=FP64)
        if head == "sequence_classification":
            x = plain(model, text, [start, *text[:-1]])[-1]
            dense, out = model.classification_head.dense, model.classification_head.out_proj
            torch.testing.assert_close(want[0], out(dense(x).tanh()), rtol=0, atol=FP64)


def test_the_encoder_is_read_once_and_beams_of_one_text_share_what_it_made():
    model, calls = tiny(LM), []
    encoder, cross = model.encoder.block[0], model.decoder.block[1].layer[1].EncDecAttention
    encoder.register_forward_hook(lambda *_: calls.append("encoder"))
    cross.k.register_forward_hook(lambda *_: calls.append("k"))
    cache = model.new_cache(3, 9)
    with torch.no_grad():
        for at in range(4):
            model(IDS, attention_mask=MASK, decoder_input_ids=WRITTEN[:, at : at + 1], cache=cache)
    assert calls == ["encoder", "k"]
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    before = cache.encoded
    cache.reorder(torch.tensor([1, 0, 3, 3, 4, 5]))
    assert cache.encoded is before
    cache.reorder(torch.tensor([2, 4]))
    assert cache.encoded is not before and cache.seen.shape[0] == len(cache.encoded[1][0]) == 2


@pytest.mark.parametrize("name", [LM, "T5ForTokenClassification"])
def test_virtual_tokens_stand_before_the_encoders_text_and_the_decoder_sees_them(name):
    model = tiny(name)
    minift.apply(model, minift.PromptTuning(num_virtual_tokens=3))
    more = {"decoder_input_ids": WRITTEN} if name == LM else {}
    prompt = model.slots[0].prompt_embeddings.expand(3, -1, -1)
    with torch.no_grad():
        got, states = model(IDS, attention_mask=MASK, **more), model.encode(IDS, MASK)
        embeds, mask = (
            torch.cat((prompt, model.embed(IDS)), dim=1),
            torch.cat((torch.ones(3, 3), MASK), dim=1),
        )
        with model.adapters.disable():
            want = model(inputs_embeds=embeds, attention_mask=mask, **more)
            without = model(IDS, attention_mask=MASK, **more)
            torch.testing.assert_close(states, model.encode(attention_mask=mask, inputs_embeds=embeds)[:, 3:])
    torch.testing.assert_close(got, want if more else want[:, 3:])
    assert (got - without).abs().max() > 0.01 and states.shape[:2] == IDS.shape
    assert model.virtual_tokens == 3 and model.dims.context == LARGEST
