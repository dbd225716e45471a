"""Generation beside transformers' on tiny random models of every family: tokens, and probabilities of draws.

Weights are random and larger than a new model's, so that no two continuations come near each other.
"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

import minift
from minift.models import MODELS, beam
from minift.models.sampling import Decoding, distribution, penalize
from minift.models.texts import Texts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

V, N = 61, 12
SMALL = {"vocab_size": V, "eos_token_id": 1, "bos_token_id": None}
FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig(
        **SMALL,
        pad_token_id=0,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
    "GPT2LMHeadModel": transformers.GPT2Config(
        **SMALL, pad_token_id=0, n_embd=32, n_layer=2, n_head=4, n_positions=64
    ),
    "T5ForConditionalGeneration": transformers.T5Config(
        vocab_size=V,
        eos_token_id=1,
        pad_token_id=0,
        decoder_start_token_id=0,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
    ),
}
TEXTS = [[5, 9, 11, 7], [8, 12, 13, 14, 15, 16, 17], [40]]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A family's model as transformers has it, and as we load it."""
    if request.param not in MODELS:
        pytest.skip(f"{request.param} is not a family of minift")
    torch.manual_seed(3)
    peer = getattr(transformers, request.param)(FAMILIES[request.param]).eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            norm = "norm" in name or ".ln_" in name
            p.copy_(
                1 + 0.1 * torch.randn_like(p) if norm and "weight" in name else 0.25 * torch.randn_like(p)
            )
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    return minift.load_model(folder), peer


def padded(texts, left):
    T = max(map(len, texts))
    gaps = [[0] * (T - len(text)) for text in texts]
    ids = [gap + text if left else text + gap for gap, text in zip(gaps, texts, strict=True)]
    ones = [[1] * len(text) for text in texts]
    mask = [gap + one if left else one + gap for gap, one in zip(gaps, ones, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def theirs(peer, texts, new, ends, left=True, **keywords):
    """The new ids of transformers' generate, without EOS and what follows it."""
    ids, mask = padded(texts, left)
    peer.generation_config.eos_token_id = list(ends) if ends else None
    out = peer.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **keywords
    )
    out = out[:, 1 if peer.config.is_encoder_decoder else ids.shape[1] :].tolist()
    return [list(itertools.takewhile(lambda token: token not in (ends or ()), row)) for row in out]


@pytest.mark.parametrize("texts", [TEXTS[:1], TEXTS], ids=["one", "three"])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_tokens_agree(pair, texts, penalty):
    ours, peer = pair
    keywords = {"repetition_penalty": penalty}
    free = minift.generate(ours, texts, N, **keywords)
    assert free == theirs(peer, texts, N, None, **keywords)
    ends = [free[0][N // 2]]  # in the middle of the first text's own continuation
    assert minift.generate(ours, texts, N, eos_ids=ends, **keywords) == theirs(
        peer, texts, N, ends, **keywords
    )


# Every combination in the long form; in the short one those that differ most from each other.
SHORT = {
    (2, 1.0, False),
    (4, 0.6, True),
    (4, 2.0, False),
    (4, 2.0, True),
    (4, 2.0, "never"),
    (2, -1.0, "never"),
}
BEAMS = [
    pytest.param(*each, marks=[] if each in SHORT else pytest.mark.slow)
    for each in itertools.product((2, 4), (1.0, 0.6, 2.0, 0.0, -1.0), (False, True, "never"))
]
# With one in eight tokens an end, and one in four, these settings give 12 different answers on one model.
ENDS = [None, range(2, V, 8), range(2, V, 4)]


@pytest.mark.parametrize("num_beams, length_penalty, early_stopping", BEAMS)
def test_beams_agree(pair, num_beams, length_penalty, early_stopping):
    ours, peer = pair
    beams = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": early_stopping}
    for ends, texts in [*itertools.product(ENDS, [TEXTS]), (ENDS[1], TEXTS[1:2])]:
        wanted = theirs(peer, texts, N, ends, **beams)
        assert minift.generate(ours, texts, N, eos_ids=ends, **beams) == wanted


@pytest.mark.parametrize("pair", ["LlamaForCausalLM"], indirect=True)
def test_a_changed_search_is_noticed(pair):
    ours, peer = pair
    wanted = [
        (settings, ends, theirs(peer, TEXTS, N, ends, **settings))
        for settings in ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": e} for e in (False, True))
        for ends in ENDS[1:]
    ]

    def check(module):
        with torch.inference_mode():
            for settings, ends, tokens in wanted:
                assert module.beam_search(Texts(ours, TEXTS, N), N, Decoding(**settings), set(ends)) == tokens

    assert not survives(check, beam, "n + width * len(ends)", "n")
    assert not survives(check, beam, "over[:, :n].nonzero()", "over.nonzero()")
    assert not survives(check, beam, "stable=True", "descending=True")


def test_beams_with_a_repetition_penalty_agree(pair):
    ours, peer = pair
    keywords = {"num_beams": 3, "repetition_penalty": 1.5}
    assert minift.generate(ours, TEXTS, N, **keywords) == theirs(peer, TEXTS, N, None, **keywords)


def test_encoder_inputs_may_be_padded_on_either_side(pair):
    ours, peer = pair
    if not ours.is_encoder_decoder:
        pytest.skip("a decoder's texts are padded on the left")
    for keywords in ({}, {"num_beams": 3}):
        new = minift.generate(ours, TEXTS, N, **keywords)
        assert new == theirs(peer, TEXTS, N, None, left=True, **keywords)
        assert new == theirs(peer, TEXTS, N, None, left=False, **keywords)


scores = st.integers(0, 2**31).map(
    lambda seed: 4 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed))
)
settings = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 1.0, 2.5])},
    optional={
        "top_k": st.integers(1, V + 5),
        "top_p": st.sampled_from([0.1, 0.5, 0.9, 0.999]),
        "min_p": st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    },
)


@given(scores, settings, st.sampled_from([1.0, 1.3, 0.7]))
def test_distributions_agree(scores, asked, penalty):
    """The same tokens are kept, with the same probabilities: the steps run in the same order."""
    seen = torch.tensor([[3, 4, 4], [0, 7, 9], [60, 1, 1]])
    peer = transformers.LlamaForCausalLM(FAMILIES["LlamaForCausalLM"])
    wanted = transformers.GenerationConfig(do_sample=True, top_k=0, repetition_penalty=penalty)
    wanted.update(**asked)
    steps = peer._get_logits_processor(wanted, input_ids_seq_length=3, device="cpu")
    expected = steps(seen, scores.clone()).softmax(dim=-1)
    p, tokens = distribution(penalize(scores, seen, penalty), Decoding(**asked))
    p = torch.zeros(3, V, dtype=p.dtype).scatter(1, tokens, p / p.sum(dim=-1, keepdim=True))
    assert torch.equal(p > 0, expected > 0)
    assert (p - expected).abs().max() < 1e-6  # fp32's softmax of 61: about 16 roundings of 2^-24
