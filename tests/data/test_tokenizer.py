"""Tokenizers from tokenizer.json and its neighbours, and from the vocabulary inside a GGUF file."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from minift.data.tokenizer import from_folder, from_gguf

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<end>"]
BOS, EOS, PAD, END = 1, 2, 3, 4
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
TEXT = ["the year 1212, then 12 and 12 and 1212", "a cat and a hat, a bat and the rat", "naïve café, 12"]


def backend() -> Backend:
    """Byte-level BPE with a few merges."""
    bpe = Backend(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return bpe


def save(folder, bpe: Backend, **files):
    """tokenizer.json and neighbours by their names without .json."""
    bpe.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    bpe = backend()
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    return from_folder(save(tmp_path_factory.mktemp("tokenizer"), bpe, tokenizer_config=settings))


@pytest.fixture(scope="module")
def metadata():
    """What a GGUF file says about the same vocabulary; "<end>" is a user-defined token."""
    bpe = json.loads(backend().to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    types = [3 if i < len(SPECIAL) else 1 for i in range(len(tokens))]
    types[END] = 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(m) for m in bpe["merges"]],
        "tokenizer.ggml.bos_token_id": BOS,
        "tokenizer.ggml.eos_token_id": EOS,
        "tokenizer.chat_template": TEMPLATE,
    }


@settings(max_examples=200)
@given(st.text())
def test_decoding_undoes_encoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.sampled_from(SPECIAL) | st.text(max_size=5)).map("".join))
def test_decoding_everything_undoes_encoding_with_special_tokens_inside(tokenizer, text):
    assume(not text.startswith("<s><s>"))  # two BOS become one
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_special_tokens_stand_around_a_text_only_where_asked(tokenizer):
    plain = tokenizer.encode("a cat")
    assert not {BOS, EOS} & set(plain)
    assert tokenizer.encode("a cat", special_tokens=True) == [BOS, *plain, EOS]


def test_special_tokens_are_recognised_in_a_text_and_left_out_of_it_again(tokenizer):
    ids = tokenizer.encode("a<pad>cat</s>")
    assert ids == [*tokenizer.encode("a"), PAD, *tokenizer.encode("cat"), EOS]
    assert tokenizer.decode(ids) == "acat"


@pytest.mark.parametrize("special_tokens", [False, True])
def test_a_text_that_starts_with_bos_does_not_get_a_second_one(tokenizer, special_tokens):
    ids = tokenizer.encode("<s>a cat", special_tokens=special_tokens)
    assert ids == [BOS, *tokenizer.encode("a cat"), *([EOS] if special_tokens else [])]


def test_a_conversation_has_the_bos_of_its_template_and_no_other(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.render_chat(messages) == "<s>a</s>b</s>"
    assert tokenizer.encode_chat(messages) == [BOS, *tokenizer.encode("a"), EOS, *tokenizer.encode("b"), EOS]


AS_TEXT = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
AS_IDS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
FORMS = {
    "text": {"tokenizer_config": AS_TEXT},
    "object": {"tokenizer_config": {role: {"content": token} for role, token in AS_TEXT.items()}},
    "special_tokens_map": {"special_tokens_map": {**AS_TEXT, "eos_token": {"content": "</s>"}}},
    "generation_config": {"generation_config": AS_IDS},
    "ids": {"config": AS_IDS},
    "null beside ids": {"tokenizer_config": dict.fromkeys(AS_TEXT), "config": AS_IDS},
    "the same twice": {"tokenizer_config": AS_TEXT, "config": {**AS_IDS, "eos_token_id": [EOS]}},
}


@pytest.mark.parametrize("files", FORMS.values(), ids=FORMS)
def test_bos_eos_and_pad_are_read_from_each_form(tmp_path, files):
    tokenizer = from_folder(save(tmp_path, backend(), **files))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (BOS, (EOS,), PAD)


def test_every_eos_id_counts_and_that_of_the_tokenizer_comes_first(tmp_path):
    tokenizer = from_folder(
        save(
            tmp_path,
            backend(),
            tokenizer_config={"eos_token": "<end>"},
            config={"eos_token_id": [EOS, END, PAD]},
        )
    )
    assert tokenizer.eos_ids == (END, EOS, PAD)


@pytest.mark.parametrize("config, pad", [({"eos_token_id": [EOS, END]}, EOS), ({}, 0)], ids=["eos", "none"])
def test_padding_without_a_name_is_an_eos_or_the_first_id(tmp_path, config, pad):
    tokenizer = from_folder(save(tmp_path, backend(), config=config))
    assert (tokenizer.bos_id, tokenizer.pad_id) == (None, pad)


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    bpe = backend()
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    tokenizer = from_folder(save(tmp_path, bpe))
    assert tokenizer.decode(tokenizer.encode("a bat and the rat")) == "a bat and the rat"
    assert 3 < len(tokenizer.encode("a bat and the rat")) < 50


def test_the_template_comes_from_its_own_file_first(tmp_path):
    save(tmp_path, backend(), tokenizer_config={"chat_template": "from the config"})
    assert from_folder(tmp_path).render_chat([]) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from é")
    assert from_folder(tmp_path).render_chat([]) == "from é"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    save(tmp_path, backend(), tokenizer_config={"chat_template": named})
    assert from_folder(tmp_path).render_chat([]) == "plain"


def test_a_chat_without_a_template_is_an_error_that_says_what_to_use(tmp_path):
    with pytest.raises(ValueError, match="no chat template; use template = 'none'"):
        from_folder(save(tmp_path, backend())).encode_chat([])


def test_a_folder_without_tokenizer_json_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing; save the tokenizer in its fast form"):
        from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "not JSON", "{}", '{"version": "1.0", "model": {}}', "[[[]]]"])
def test_a_broken_tokenizer_json_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        from_folder(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '"text"'])
def test_a_broken_neighbour_is_an_error_that_names_it(tmp_path, content):
    save(tmp_path, backend())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        from_folder(tmp_path)


@settings(max_examples=200)
@given(st.text())
def test_the_vocabulary_of_a_gguf_file_gives_the_same_ids(tokenizer, metadata, text):
    gguf = from_gguf(metadata)
    assert gguf.encode(text) == tokenizer.encode(text)
    assert gguf.decode(gguf.encode(text)) == text


def test_a_gguf_file_names_special_tokens_and_the_template(metadata):
    gguf = from_gguf(metadata)
    assert (gguf.bos_id, gguf.eos_ids, gguf.pad_id) == (BOS, (EOS,), EOS)
    assert from_gguf({**metadata, "tokenizer.ggml.padding_token_id": PAD}).pad_id == PAD
    assert gguf.encode_chat([{"role": "user", "content": "a"}]) == [BOS, *gguf.encode("a"), EOS]


def test_control_tokens_are_left_out_of_decoded_text_and_user_defined_ones_are_not(metadata):
    gguf = from_gguf(metadata)
    ids = gguf.encode("a<end></s>")
    assert ids == [*gguf.encode("a"), END, EOS]
    assert gguf.decode(ids) == "a<end>"


def test_smollm_splits_digits_and_gpt2_does_not(metadata):
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    assert from_gguf(metadata).encode("12") == [vocabulary["12"]]
    smollm = from_gguf({**metadata, "tokenizer.ggml.pre": "smollm"})
    assert smollm.encode("12") == [vocabulary["1"], vocabulary["2"]]


def test_a_merge_does_not_reach_over_the_border_of_a_word(metadata):
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [*metadata["tokenizer.ggml.merges"], "a !"]
    gguf = from_gguf(
        {
            **metadata,
            "tokenizer.ggml.tokens": [*tokens, "a!"],
            "tokenizer.ggml.merges": merges,
            "tokenizer.ggml.token_type": [*types, 1],
        }
    )
    assert gguf.encode("a!") == [tokens.index("a"), tokens.index("!")]


@pytest.mark.parametrize(
    "change",
    [{"tokenizer.ggml.model": "llama"}, {"tokenizer.ggml.model": None}, {"tokenizer.ggml.pre": "llama-bpe"}],
    ids=str,
)
def test_an_unknown_kind_of_gguf_tokenizer_is_refused_by_name(metadata, change):
    named = next(iter(change.values()))
    with pytest.raises(ValueError, match=f"{named!r}.* is not supported; .*'smollm', 'gpt-2'"):
        from_gguf({**metadata, **change})


def test_a_gguf_file_that_wants_bos_gets_it_or_is_refused(metadata):
    try:
        gguf = from_gguf({**metadata, "tokenizer.ggml.add_bos_token": True})
    except ValueError as error:
        assert "add_bos_token" in str(error)
    else:
        assert gguf.encode("a", special_tokens=True) == [BOS, *gguf.encode("a")]
