"""T5 on disk and beside its forward: embeddings, the head's tie, config.json, calls, blocks of two stacks."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

import minift
from minift.models.t5 import T5Config

LM = "T5ForConditionalGeneration"
IDS = torch.tensor([[4, 8, 15, 16, 1], [23, 42, 1, 0, 0]])
WRITTEN = torch.tensor([[0, 5, 6], [0, 91, 3]])


@pytest.fixture
def folder(tmp_path):
    minift.save_model(tiny(LM), tmp_path)
    return tmp_path


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_copies_of_the_embeddings_must_equal_them_and_may_stand_for_them(folder):
    want = tiny(LM).embed_weight
    change_tensors(folder, lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}))
    assert torch.equal(minift.load_model(folder).embed_weight, want)
    change_tensors(folder, lambda t: t.update({"shared.weight": want.detach().clone()}))
    assert torch.equal(minift.load_model(folder).embed_weight, want)
    for other in (torch.zeros(97, 32), torch.zeros(()), want.detach().bfloat16()):
        change_tensors(folder, lambda t, other=other: t.update({"decoder.embed_tokens.weight": other}))
        with pytest.raises(ValueError, match="decoder.embed_tokens.weight with other numbers than shared.w"):
            minift.load_model(folder)


def test_a_stored_head_of_other_numbers_unties_it_and_stays_so(folder, tmp_path):
    change_tensors(folder, lambda t: t.update({"lm_head.weight": t["shared.weight"] * 2}))
    model = minift.load_model(folder)
    assert not model.tied and not model.config.tie_word_embeddings and model.config.scale_decoder_outputs
    minift.save_model(model, tmp_path / "again")
    again = minift.load_model(tmp_path / "again")
    assert again.config == model.config and torch.equal(again.head.weight, again.embed_weight * 2)


CONFIG_ERRORS = {
    "silu": ({"feed_forward_proj": "gated-silu"}, "is 'gated-silu'; supported: 'relu', 'gated-gelu'"),
    "gelu": ({"dense_act_fn": "gelu"}, "dense_act_fn = 'gelu' changes the forward"),
    "gated": ({"is_gated_act": True}, "is_gated_act = True changes the forward"),
    "decoder": ({"is_decoder": True}, "is_decoder = True changes the forward"),
    "stacks": ({"tie_encoder_decoder": True}, "tie_encoder_decoder = True changes the forward"),
    "type": ({"model_type": "umt5"}, "model_type = 'umt5' changes the forward"),
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map = {'AutoModel': 'x.Y'} changes the forward"),
    "buckets": ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets is 2, at least 4"),
    "distance": ({"relative_attention_max_distance": 4}, "max_distance is 4, which must be above half"),
    "encoder": ({"is_encoder_decoder": False}, "the head 'seq2seq_lm' reads a decoder"),
    "missing": ({"d_kv": None}, "config.json lacks d_kv"),
    "range": ({"num_heads": 0}, "num_heads is 0; it must be positive"),
    "blocks": ({"num_decoder_layers": 2000}, "num_decoder_layers is 2000; at most 1024"),
}


@pytest.mark.parametrize("name", CONFIG_ERRORS)
def test_a_config_with_another_forward_is_refused(folder, name):
    change, message = CONFIG_ERRORS[name]
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        minift.load_model(folder)


def test_what_config_json_leaves_out_is_what_transformers_makes_of_it():
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    given = {name: getattr(tiny(LM).config, name) for name in sizes}
    found = T5Config.from_hf({**given, "pad_token_id": 4})
    assert found.num_decoder_layers == found.num_layers == 2 and found.decoder_start_token_id == 4
    assert found.tie_word_embeddings and found.scale_decoder_outputs and found.feed_forward_proj == "relu"
    assert (found.relative_attention_num_buckets, found.relative_attention_max_distance) == (32, 128)
    assert not T5Config.from_hf({**given, "tie_word_embeddings": False}).scale_decoder_outputs


def test_a_decoder_without_weights_is_missing(folder):
    change_tensors(folder, lambda t: [t.pop(name) for name in list(t) if name.startswith("decoder.block.1")])
    with pytest.raises(ValueError, match="missing decoder.block.1.layer.0.SelfAttention.k.weight"):
        minift.load_model(folder)
    model = minift.load_model(folder, head="token_classification", num_labels=2)
    assert model.architecture == "T5ForTokenClassification" and not model.is_encoder_decoder


def test_shift_right_begins_with_the_start_and_ends_before_the_last():
    model = tiny(LM, decoder_start_token_id=3, pad_token_id=2)
    labels = torch.tensor([[7, 8, 9], [7, -100, -100]])
    assert model.shift_right(labels).tolist() == [[3, 7, 8], [3, 7, 2]]
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    assert model.shift_right(torch.tensor([[7, 8, 9], [2, 7, 8]]), mask).tolist() == [[3, 7, 8], [3, 3, 7]]
    assert model.decoder_start_id == 3


def test_what_a_call_lacks_is_named():
    model, classifier = tiny(LM), tiny("T5ForSequenceClassification")
    with pytest.raises(ValueError, match="decoder_input_ids are missing"):
        model(IDS)
    with pytest.raises(ValueError, match="decoder_input_ids are missing"):
        classifier(inputs_embeds=classifier.embed(IDS))
    with pytest.raises(ValueError, match="at the last EOS of input_ids; give them"):
        classifier(inputs_embeds=classifier.embed(IDS), decoder_input_ids=IDS)
    with pytest.raises(ValueError, match="text 1 of the batch has no eos_token_id, 1;"):
        classifier(torch.tensor([[5, 1], [5, 6]]))
    for wrong in ({"position_ids": IDS}, {"prefix_kv": [()]}):
        with pytest.raises(ValueError, match="takes no position_ids and no prefix_kv"):
            model(IDS, decoder_input_ids=WRITTEN, **wrong)
    with pytest.raises(ValueError, match=r"decoder_attention_mask has shape \(2, 2\).* it is \(2, 3\)"):
        model(IDS, decoder_input_ids=WRITTEN, decoder_attention_mask=torch.ones(2, 2))
    with pytest.raises(ValueError, match="no KV cache"):
        tiny("T5EncoderModel").new_cache(1, 2)


def test_blocks_are_the_decoders_and_numbers_count_both_stacks():
    model = tiny(LM, num_decoder_layers=3)
    assert len(model.blocks) == model.dims.blocks == 3 and model.blocks is model.decoder.block
    assert model.block_index("encoder.block.1.layer.0.SelfAttention.q") == 1
    assert model.block_index("decoder.block.2.layer.2.DenseReluDense.wo") == 2
    assert model.block_index("encoder.final_layer_norm") is None
    plan = minift.apply(model, minift.Selective(last_blocks=1, head=False))
    assert {site.path.rpartition(".layer.")[0] for site in plan.sites} == {"decoder.block.2"}
    plan = minift.apply(tiny(LM), minift.LoRA(target_modules=("q",), layers_to_transform=("1",)))
    paths = [site.path for site in plan.sites]
    assert len(paths) == 3 and [p.startswith("encoder.block.1.") for p in paths] == [True, False, False]
