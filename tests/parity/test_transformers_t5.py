"""T5 beside transformers and peft: numbers and gradients of every head, folders, tokens, adapters."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers
from families import (
    GRID,
    TOLERANCE,
    change_config,
    check_folders,
    compare,
    largest,
    ours_of,
    random_peer,
    texts,
    theirs_of,
)
from tiny import tiny

import minift

pytestmark = pytest.mark.parity

V, EOS = 41, 40
SIZES = {
    "vocab_size": V,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
    "eos_token_id": EOS,
}
FLAN = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
LM = "T5ForConditionalGeneration"
LABELLED = {"T5ForSequenceClassification": {"num_labels": 3}, "T5ForTokenClassification": {"num_labels": 4}}
HEADS = (LM, *LABELLED, "T5ForQuestionAnswering", "T5Model", "T5EncoderModel")
configs = st.fixed_dictionaries(
    {
        "d_model": st.sampled_from([12, 20]),
        "d_kv": st.sampled_from([4, 6]),
        "num_heads": st.integers(1, 4),
        "num_layers": st.integers(1, 3),
        "num_decoder_layers": st.integers(1, 3),
        "relative_attention_num_buckets": st.sampled_from([4, 8, 32]),
        "relative_attention_max_distance": st.sampled_from([17, 128]),
        "layer_norm_epsilon": st.sampled_from([1e-6, 1e-3]),
        "feed_forward_proj": st.sampled_from(["relu", "gated-gelu"]),
        "scale_decoder_outputs": st.booleans(),
    }
)


def t5(name=LM, seed=0, **fields):
    """A transformers model whose q is smaller by sqrt(hd), by which no T5 divides its scores."""
    peer = random_peer(name, seed, **{**SIZES, **LABELLED.get(name, {}), **fields})
    with torch.no_grad():
        for path, p in peer.named_parameters():
            if path.endswith(".q.weight"):
                p.mul_(peer.config.d_kv**-0.5)
    return peer


def untied(peer):
    """Checkpoints of version 1.1 have a head of their own."""
    random = torch.Generator().manual_seed(7)
    peer.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(V, peer.config.d_model, generator=random))
    return peer


def check(ours, peer, lengths=(1, 5), paddings=("none", "left", "right", "hole"), masked=True):
    """`compare` over batches and paddings of the encoder and, where it has its own input, of the decoder.

    `masked` gives the peer's decoder, where it reads the encoder's text, that text's mask, as ours has it.
    """
    for seed, (B, T, padding) in enumerate(GRID):
        if padding not in paddings:
            continue
        ids, mask = texts(EOS, B, T, padding, seed)  # without EOS
        if ours.head_kind == "sequence_classification":
            ends = (torch.arange(T) * mask).argmax(-1)
            ids[torch.arange(B), ends] = EOS
        if ours.head_kind in ("sequence_classification", "question_answering"):
            compare(ours, peer, ids, mask, theirs={"decoder_attention_mask": mask} if masked else {})
        elif not ours.is_encoder_decoder:
            compare(ours, peer, ids, mask)
        else:
            written, real = texts(V, B, lengths[seed % 2], padding, seed + 50)
            compare(ours, peer, ids, mask, decoder_input_ids=written)
            compare(ours, peer, ids, mask, decoder_input_ids=written, decoder_attention_mask=real)


@settings(max_examples=10)
@given(configs, st.booleans(), st.integers(0, 99), st.sampled_from(["left", "right", "hole"]))
def test_outputs_and_gradients_agree_on_random_configs(tmp_path_factory, config, tied, seed, padding):
    peer = t5(seed=seed, **config)
    ours = ours_of(peer if tied else untied(peer), tmp_path_factory.mktemp("m"))
    assert ours.tied == tied
    check(ours, peer, paddings=(padding,))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("fields", [{}, FLAN], ids=["t5", "flan"])
def test_every_head_agrees(tmp_path, name, fields):
    peer = t5(name, **fields)
    check(ours_of(peer, tmp_path), peer)


@pytest.mark.parametrize("name", ["T5ForSequenceClassification", "T5ForQuestionAnswering"])
def test_without_padding_on_the_left_transformers_needs_no_mask_of_the_decoder(tmp_path, name):
    peer = t5(name)
    check(ours_of(peer, tmp_path), peer, paddings=("none", "right"), masked=False)


def test_regression_has_one_output(tmp_path):
    peer = t5("T5ForSequenceClassification", num_labels=1)
    check(ours_of(peer, tmp_path), peer)


def test_a_long_text_passes_the_last_bucket(tmp_path):
    peer = t5()
    ids, mask = texts(V, 2, 40, "left")
    compare(ours_of(peer, tmp_path), peer, ids, mask, decoder_input_ids=texts(V, 2, 33, "none", 1)[0])


def test_a_decoder_that_reads_in_pieces_through_its_cache_agrees(tmp_path):
    peer = t5()
    ours = ours_of(untied(peer), tmp_path)
    ids, mask = texts(V, 3, 7, "right")
    written, real = texts(V, 3, 9, "left", 1)
    cache, got, at = ours.new_cache(3, 9), [], 0
    with torch.no_grad():
        want = peer(
            input_ids=ids, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=real
        ).logits
        for n in (3, 1, 1, 4):
            part = {"decoder_input_ids": written[:, at : at + n], "decoder_attention_mask": real[:, : at + n]}
            got.append(ours(ids, attention_mask=mask, cache=cache, **part))
            at += n
    difference = (torch.cat(got, dim=1) - want)[real.bool()]
    assert difference.abs().max() <= TOLERANCE * largest([want])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("fields", [{}, FLAN], ids=["t5", "flan"])
def test_folders_go_both_ways_to_the_bit(tmp_path, name, fields):
    peer = t5(name, **fields)
    check_folders(peer, tmp_path, unimportant=("tie_encoder_decoder",))


@pytest.mark.parametrize("scaled", [True, False])
def test_a_folder_with_a_head_of_its_own_goes_both_ways(tmp_path, scaled):
    peer = untied(t5(scale_decoder_outputs=scaled))
    check_folders(peer, tmp_path, unimportant=("tie_encoder_decoder",))
    ours = minift.load_model(tmp_path / "ours")
    assert not ours.tied and not ours.config.tie_word_embeddings
    assert ours.config.scale_decoder_outputs == scaled
    check(ours, peer)


@pytest.mark.parametrize("own_head", [True, False])
@pytest.mark.parametrize("tie", [None, True, False])
@pytest.mark.parametrize("scale", [None, True, False])
def test_ties_and_scales_are_what_transformers_makes_of_them(tmp_path, own_head, tie, scale):
    """Old spelling without scale_decoder_outputs, new with tie_word_embeddings always true, any mixture."""
    peer = t5()
    ours_of(untied(peer) if own_head else peer, tmp_path)
    said = {"tie_word_embeddings": tie, "scale_decoder_outputs": scale}

    def change(config):
        rest = {name: value for name, value in config.items() if name not in said}
        return rest | {name: value for name, value in said.items() if value is not None}

    change_config(tmp_path, change)
    if tie is False and not own_head:  # transformers ties them; the config says that a head is missing
        with pytest.raises(ValueError, match="missing lm_head.weight"):
            minift.load_model(tmp_path)
        return
    ours, again = minift.load_model(tmp_path), getattr(transformers, LM).from_pretrained(tmp_path)
    assert ours.config.scale_decoder_outputs == again.config.scale_decoder_outputs
    assert ours.tied == (again.lm_head.weight is again.shared.weight)
    again.set_attn_implementation("eager")
    check(ours, again, paddings=("right",))


@pytest.mark.parametrize("fields", [{}, FLAN], ids=["t5", "flan"])
def test_checkpoints_of_version_four_load(tmp_path, fields):
    """Copies of the embeddings, a table that was never used, the fields of google/flan-t5's config.json."""
    peer = t5(**fields)
    peer = untied(peer) if fields else peer
    ours_of(peer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for copy in ("encoder.embed_tokens", "decoder.embed_tokens", *([] if fields else ["lm_head"])):
        tensors[f"{copy}.weight"] = tensors["shared.weight"].clone()
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unused] = torch.randn(8, 3)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    new = ("scale_decoder_outputs", "tie_word_embeddings", "dense_act_fn", "is_gated_act", "is_decoder")
    old = {
        "architectures": ["T5ForConditionalGeneration" if fields else "T5WithLMHeadModel"],
        "n_positions": 512,
        "output_past": True,
        "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
        "transformers_version": "4.23.1",
        "torch_dtype": "float32",
        **({"tie_word_embeddings": False} if fields else {}),
    }
    change_config(tmp_path, lambda config: {k: v for k, v in config.items() if k not in new} | old)
    ours = minift.load_model(tmp_path)
    assert ours.tied == (not fields) and ours.architecture == LM
    check(ours, peer)


def test_an_encoder_of_version_four_says_by_its_name_that_it_has_no_decoder(tmp_path):
    peer = t5("T5EncoderModel")
    ours_of(peer, tmp_path)
    change_config(tmp_path, lambda config: {**config, "is_encoder_decoder": True})
    check(minift.load_model(tmp_path), peer)


@pytest.mark.parametrize(
    "head, new",
    {
        "sequence_classification": ("classification_head.dense", "classification_head.out_proj"),
        "token_classification": ("classifier",),
        "question_answering": ("qa_outputs",),
        "none": (),
    }.items(),
)
def test_other_heads_stand_on_a_language_model(tmp_path, head, new):
    peer = untied(t5())
    labels = {"num_labels": 2} if head.endswith("classification") else {}
    ours_of(peer, tmp_path / "lm")
    ours = minift.load_model(tmp_path / "lm", head=head, **labels)
    assert ours.new_modules == new
    state = peer.state_dict()
    for name, p in ours.named_parameters():
        assert ours.is_new(name) or torch.equal(p, state[name.removeprefix("transformer.")]), name
    check(ours, theirs_of(ours, tmp_path / "new"), paddings=("left",))


def test_greedy_generation_agrees_in_a_padded_batch(tmp_path):
    ours = tiny(LM)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    ids = torch.tensor([p + [0] * (5 - len(p)) for p in prompts])
    mask = torch.tensor([[1] * len(p) + [0] * (5 - len(p)) for p in prompts])
    out = theirs_of(ours, tmp_path).generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=20, do_sample=False, eos_token_id=None
    )
    assert len(set(map(tuple, out.tolist()))) == 3
    assert minift.generate(ours, prompts, 20) == out[:, 1:].tolist()


@pytest.mark.parametrize("method", ["LoRA", "PromptTuning", "PTuning"])
def test_adapters_mean_the_same_in_peft(tmp_path, method):
    peft = pytest.importorskip("peft")
    ours = tiny(LM)
    fields = {"r": 3, "target_modules": ("q", "v", "wo")} if method == "LoRA" else {"num_virtual_tokens": 4}
    peer = theirs_of(ours, tmp_path / "base")
    minift.apply(ours, getattr(minift, method)(**fields), seed=3)
    with torch.no_grad():
        for p in (p for p in ours.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn_like(p))
    minift.save_adapter(ours, tmp_path / "adapter")
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    )
    theirs = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
    ids, mask = texts(97, 3, 7, "right")
    written = texts(97, 3, 5, "none", 1)[0]
    with torch.no_grad():
        a = ours(ids, attention_mask=mask, decoder_input_ids=written)
        b = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=written).logits
        with ours.adapters.disable():
            plain = ours(ids, attention_mask=mask, decoder_input_ids=written)
    assert (a - b).abs().max() <= TOLERANCE * largest([b])
    assert (a - plain).abs().max() > 0.01 * largest([b])
