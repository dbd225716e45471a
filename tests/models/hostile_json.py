"""Hostile JSON: documents that no reader should parse, and settings of models, adapters and tokenizers."""

import json


def broken_json():
    """Name -> bytes that are no JSON object, or one that readers disagree about, or a bomb."""
    yield from {
        "nothing": b"",
        "half": b'{"a": 1',
        "a list": b"[]",
        "a text": b'"x"',
        "a number": b"5",
        "null": b"null",
        "nested 100,000 deep": b'{"a":' * 100_000,
        "lists 100,000 deep": b"[" * 100_000,
        "closed 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "33 deep": b'{"a":' * 33 + b"1" + b"}" * 33,
        "100,000 digits": b'{"a":' + b"9" * 100_000 + b"}",
        "2 MiB": b'{"a": "' + b"x" * 2**21 + b'"}',
        "2 MiB of spaces": b" " * 2**21 + b"{}",
        "NaN": b'{"a": NaN}',
        "Infinity": b'{"a": -Infinity}',
        "1e999": b'{"a": 1e999}',
        "2^64": b'{"a": 18446744073709551616}',
        "a key twice": b'{"a": 1, "a": 2}',
        "a key twice, hidden": b'{"a": 1, "\\u0061": 2}',
        "100,000 numbers": b'{"a":[' + b"1," * 99_999 + b"1]}",
        "100,000 tables": b'{"a":[' + b"{}," * 99_999 + b"{}]}",
        "no UTF-8": b'{"a": "\xff"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a mark": b"\xef\xbb\xbf{}",
        "NULs": bytes(99),
        "more behind it": b"{} {}",
        "a comment": b"{} // x",
        "a comma at the end": b'{"a": 1,}',
        "YAML": b"!!python/object/apply:os.system ['x']",
        "quotes": b'"' * 2**19,
        "backslashes": b'{"' + b"\\" * 2**19,
    }.items()


IGNORED = "(ignored)"  # loads, and nothing comes of it
WHOLE = (0, -1, 2**31, 10**18, 10**30, 1.5, "16", [16], {"a": 1}, True)
COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COUNTS += ("num_key_value_heads", "head_dim", "max_position_embeddings")
CONFIG = {
    **dict.fromkeys(COUNTS, WHOLE),
    "num_hidden_layers": (*WHOLE, 2, 14, 1024, 1025, 10**9),
    "hidden_size": (*WHOLE, 17, 2**30),
    "vocab_size": (*WHOLE, 12, 2**30),
    "num_attention_heads": (*WHOLE, 3, 10**9),
    "rms_norm_eps": (0, -1, "x", [], True),
    "rope_theta": (0, -1, "x", [], True),
    "rope_scaling": (
        5,
        "x",
        {"rope_type": []},
        {"type": {}},
        {"rope_type": "linear", "factor": 0},
        {"rope_type": "yarn"},
    ),
    "rope_parameters": (5, "x", [1], {"rope_type": {"a": 1}}, {"rope_theta": "x"}, {"rope_theta": -1}),
    "tie_word_embeddings": ("no", 1, []),
    "hidden_act": ("os.system", [], {}, 5),
    "model_type": ("os.system", [1], {"a": 1}, 5),
    "architectures": (
        None,
        [],
        5,
        [5],
        [["LlamaForCausalLM"]],
        [{}],
        "LlamaForCausalLM",
        ["os.system"],
        ["Llama"],
        {"a": 1},
    ),
    "auto_map": ({"AutoModel": "evil.Model"},),
    "quantization_config": (
        5,
        "x",
        [],
        {"quant_method": []},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
    ),
}


def config_values(files):
    """(file, name, bytes) of a config.json with a setting that it cannot have."""
    config = json.loads(files["config.json"])
    for field, values in CONFIG.items():
        for value in values:
            changed = {**config, field: value}
            yield "config.json", f"{field} {value!r:.40}", json.dumps(changed).encode()
    for field in (*COUNTS[:5], "architectures"):
        left = {name: value for name, value in config.items() if name != field}
        yield "config.json", f"without {field}", json.dumps(left).encode()


LORA = {
    "r": (0, -1, 3, 10**9, 2**62, "2", 1.5, None, True, [], {}),
    "lora_alpha": (0, -1, 3, 1e300, "x", None, True, []),
    "target_modules": (
        [],
        ["nope"],
        [5],
        5,
        {},
        None,
        "(a+)+$",
        ".*",
        ["q_proj"],
        ["*" * 200 + "x"],
        ["../x"],
        [["q_proj"]],
    ),
    "rank_pattern": (5, {"q_proj": 10**9}, {"q_proj": "x"}, {"(a+)+$": 2}, {"q_proj": None}),
    "alpha_pattern": (5, {"q_proj": "x"}, {"(.*)*": 2}),
    "peft_type": (None, 5, [], {}, "os.system", "LOHA", "ADALORA", "IA3", "PROMPT_TUNING", "BOTTLENECK"),
    "modules_to_save": (5, ["nope"], [5], {"a": 1}, "(a+)+$"),
    "layers_to_transform": ([10**9], [-1], "x", [None]),
    "use_dora": ("x", 5, [1]),
    "bias": ("all", 5, ["x"]),
    "no_such_field": (1, "x", {"a": 1}),
}
KINDS = {
    "PROMPT_TUNING": {"num_virtual_tokens": (0, -1, 10**9, 2**62, "4", 1.5, None, True, [])},
    "PREFIX_TUNING": {"num_virtual_tokens": (10**9, "4", None), "num_layers": (10**9,)},
    "P_TUNING": {"num_virtual_tokens": (10**9,)},
    "BOTTLENECK": {"bottleneck_dim": (0, 10**9, 2**62, "x", None), "no_such_field": (1,)},
    "IA3": {"target_modules": (".*", 5, [5], ["nope"]), "feedforward_modules": (5, {}, "x")},
    "SELECTIVE": {"target_modules": (5, ["nope"])},
}


def adapter_values(files):
    config = json.loads(files["adapter_config.json"])
    for field, values in LORA.items():
        for value in values:
            yield (
                "adapter_config.json",
                f"{field} {value!r:.40}",
                json.dumps({**config, field: value}).encode(),
            )
    popen = {"base_model_class": "Popen", "parent_library": "subprocess"}
    for field, value in {"auto_mapping": popen, "init_lora_weights": "os.system"}.items():
        yield "adapter_config.json", f"{field} {IGNORED}", json.dumps({**config, field: value}).encode()
    for kind, fields in KINDS.items():
        for field, values in fields.items():
            for value in values:
                other = {"peft_type": kind, "target_modules": None, field: value}
                yield "adapter_config.json", f"{kind} {field} {value!r:.40}", json.dumps(other).encode()


def tokenizer_values(files):
    whole = json.loads(files["tokenizer.json"])
    model = whole["model"]
    for what, change in {
        "another model": {"model": {"type": "os.system"}},
        "no model": {"model": None},
        "version 9": {"version": "9"},
        "vocabulary a list": {"model": {**model, "vocab": []}},
        "negative ids": {"model": {**model, "vocab": {"a": -1}}},
        "merges of unknown tokens": {"model": {**model, "merges": [["x", "y"]]}},
        "merges of numbers": {"model": {**model, "merges": [5]}},
        "ids of 2^64": {"model": {**model, "vocab": {"a": 2**64}}},
        "a broken pattern": {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
        "another normalizer": {"normalizer": {"type": "Exec"}},
        "added tokens a text": {"added_tokens": "x"},
        "added tokens without ids": {"added_tokens": [{"content": "x"}]},
        "a processor of nothing": {"post_processor": {"type": "TemplateProcessing"}},
        "an unknown token that is none": {"model": {**model, "type": "WordPiece", "unk_token": 5}},
    }.items():
        yield "tokenizer.json", what, json.dumps({**whole, **change}).encode()
    for role in ("bos", "eos", "pad"):
        for value in ("5", [[1]], {}, 2**40, 1.5, -5, True, [None, {}]):
            yield (
                "tokenizer_config.json",
                f"{role}_token_id {value!r}",
                json.dumps({f"{role}_token_id": value}).encode(),
            )
    for value in (5, {"a": 1}, [{"name": "default", "template": 5}], True):
        yield (
            "tokenizer_config.json",
            f"chat_template {value!r}",
            json.dumps({"chat_template": value}).encode(),
        )
    for what, data in {
        "deep": b"[" * 100_000,
        "4 MiB": b" " * (2**22 + 1),
        "a list": b"[]",
        "half": b"{",
        "no UTF-8": b"\xff",
    }.items():
        yield "tokenizer_config.json", what, data
    yield "chat_template.jinja", "no UTF-8", b"\xff\xfe"
    yield "chat_template.jinja", "5 MiB", b"x" * 5 * 2**20
