"""Configurations: files, flags, types, and that a written config reads back as itself."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minift.config import RunConfig, override, read_config, read_flags, run_config
from minift.methods import apply
from minift.methods.full import Full
from minift.methods.lora import LoRA
from minift.optim.schedule import SCHEDULES
from minift.training.record import describe_run
from minift.training.settings import TrainConfig


def resolve(tree: dict, *words: str) -> RunConfig:
    return run_config(override({"data": "rows.jsonl", **tree}, read_flags(list(words))))


def written(config: RunConfig) -> dict:
    """The form in which a run writes its configuration."""
    plain = {name: getattr(config, name) for name in ("data", "model", "dtype", "device", "valid")}
    method = {"name": config.method.name, **asdict(config.method)}
    return json.loads(json.dumps({**plain, "method": method, "train": asdict(config.train)}))


rules = st.lists(st.text(min_size=1).filter(lambda rule: rule == rule.strip()), max_size=3).map(tuple)
names = st.from_regex(r"[a-z_*?]{1,4}(\.[a-z0-9_*?]{1,4}){0,2}", fullmatch=True)
methods = st.just(Full()) | st.builds(
    LoRA,
    r=st.integers(1, 512),
    alpha=st.floats(1e-3, 1e3),
    dropout=st.floats(0, 0.9),
    rslora=st.booleans(),
    target_modules=rules,
    exclude_modules=rules,
    layers_to_transform=rules,
    rank_pattern=st.dictionaries(names, st.integers(1, 512), max_size=3),
    alpha_pattern=st.dictionaries(names, st.floats(1e-3, 1e3), max_size=3),
)
trains = st.builds(
    TrainConfig,
    output=st.text(),
    epochs=st.integers(1, 99),
    learning_rate=st.floats(1e-9, 1),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    weight_decay=st.floats(0, 1),
    seed=st.integers(0),
)
configs = st.builds(
    RunConfig,
    data=st.text(),
    model=st.text(),
    dtype=st.text(),
    device=st.text(),
    valid=st.text(),
    method=methods,
    train=trains,
)


@given(configs)
def test_a_written_config_reads_back_as_itself(config):
    assert run_config(written(config)) == config


def test_what_a_run_records_reads_back_as_its_config(model):
    method, train = LoRA(r=2, target_modules=("q_proj",)), TrainConfig(epochs=3)
    model.source = "tiny"
    apply(model, method)
    recorded = json.loads(json.dumps(describe_run(model, "a.jsonl", Path("b.jsonl"), train)))
    assert run_config(recorded) == RunConfig(
        data="a.jsonl", model="tiny", dtype="float32", valid="b.jsonl", method=method, train=train
    )


@given(configs)
def test_every_setting_may_be_given_as_a_flag(config):
    tree = written(config)
    leaves = {name: value for name, value in tree.items() if isinstance(value, str)}
    leaves |= {
        f"{table}.{name}": value for table in ("method", "train") for name, value in tree[table].items()
    }
    patterns = [path for path, value in leaves.items() if isinstance(value, dict)]
    for path in patterns:
        pattern = leaves.pop(path)
        assume(not any(b.startswith(a + ".") for a in pattern for b in pattern))  # no table in a value
        leaves |= {f"{path}.{rule}": value for rule, value in pattern.items()}
    lists = [value for value in leaves.values() if isinstance(value, list)]
    assume(not any("," in rule for rules in lists for rule in rules))
    words = [f"--{path}={','.join(v) if isinstance(v, list) else v}" for path, v in leaves.items()]
    assert run_config(override({}, read_flags(words))) == config


def test_defaults_are_those_of_the_dataclasses():
    assert resolve({}) == RunConfig("rows.jsonl")
    assert resolve({"method": {}, "train": {}}) == RunConfig("rows.jsonl")


UNKNOWN = [
    ({"modle": "x"}, r"unknown setting modle; did you mean model\?"),
    ({"train": {"epoch": 2}}, r"unknown setting train\.epoch; did you mean train\.epochs\?"),
    ({"method": {"target_module": "q"}}, r"method\.target_module; did you mean method\.target_modules\?"),
    ({"train": {"zzz": 2}}, r"unknown setting train\.zzz; known: output, epochs,"),
    ({"method": {"name": "full", "r": 2}}, r"unknown setting method\.r;"),
    ({"method": {"name": "lroa"}}, r"method\.name is 'lroa'; known methods: full, selective, lora"),
    ({"method": "adapter"}, r"method\.name is 'adapter'; known methods: full, selective, lora"),
]


@pytest.mark.parametrize("tree, message", UNKNOWN)
def test_an_unknown_name_is_an_error_with_its_path_and_the_nearest_or_the_known_ones(tree, message):
    with pytest.raises(ValueError, match=message):
        resolve(tree)


WRONG = {
    "train.epochs is 1.0, expected int": {"train": {"epochs": 1.0}},
    "train.epochs is True, expected int": {"train": {"epochs": True}},
    "train.epochs is 'two', expected int": {"train": {"epochs": "two"}},
    "train.epochs is None, expected int": {"train": {"epochs": None}},
    "train.learning_rate is 'fast', expected float": {"train": {"learning_rate": "fast"}},
    "train.learning_rate is True, expected float": {"train": {"learning_rate": True}},
    "train is 'fast', expected a table with output, epochs": {"train": "fast"},
    "method.rslora is 1, expected bool": {"method": {"rslora": 1}},
    "method.rslora is 'yes', expected bool": {"method": {"rslora": "yes"}},
    "method.name is ['lora']": {"method": {"name": ["lora"]}},
    "method is ['lora'], expected a table with name": {"method": ["lora"]},
    "method.target_modules is {'q': 1}, expected a list": {"method": {"target_modules": {"q": 1}}},
    "method.target_modules is [['q']], expected a list": {"method": {"target_modules": [["q"]]}},
    "method.target_modules is [None]": {"method": {"target_modules": [None]}},
    "method.target_modules is True, expected a list": {"method": {"target_modules": True}},
    "data is 3, expected str": {"data": 3},
    "method.rank_pattern is [4], expected a table": {"method": {"rank_pattern": [4]}},
    "method.rank_pattern.q_proj is 4.0, expected int": {"method": {"rank_pattern": {"q_proj": 4.0}}},
    "method.rank_pattern.mlp.up is 'x', expected int": {"method": {"rank_pattern": {"mlp": {"up": "x"}}}},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_value_of_the_wrong_type_is_an_error_with_its_path_and_the_type(message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        resolve(WRONG[message])


@pytest.mark.parametrize("path", ["method.r", "train.epochs"])
def test_a_value_out_of_range_is_an_error_of_its_dataclass(path):
    with pytest.raises(ValueError, match=f"{path.split('.')[1]} is 0"):
        resolve({}, f"--{path}", "0")


def test_missing_data_is_an_error_that_says_where_to_give_it():
    with pytest.raises(ValueError, match="setting data is missing; give it in the config or as --data"):
        run_config({})


def test_flags_are_paths_with_a_value_behind_a_blank_or_an_equals_sign():
    flags = read_flags(["--data", "a", "--train.seed=3", "--train.output", "", "--model=b=c", "--x", "-1"])
    assert flags == {"data": "a", "train.seed": "3", "train.output": "", "model": "b=c", "x": "-1"}


@pytest.mark.parametrize("words, name", [(["--data"], "--data"), (["--resume", "--data", "a"], "--resume")])
def test_a_flag_without_a_value_is_an_error(words, name):
    with pytest.raises(ValueError, match=f"^{name} needs a value"):
        read_flags(words)


@pytest.mark.parametrize("word", ["train.epochs", "-e", "--", ""])
def test_a_word_that_is_no_flag_is_an_error(word):
    with pytest.raises(ValueError, match=f"unexpected argument {word!r}; settings are given as --path value"):
        read_flags(["--data", "a", word, "2"])


def test_a_dash_in_a_name_is_an_underscore_and_the_same_flag():
    assert read_flags(["--a.b-c", "0-3", "--a.b_c=0-3"]) == {"a.b_c": "0-3"}
    with pytest.raises(ValueError, match=r"--b_c is given twice, as '1' and '2'; leave one out"):
        read_flags(["--b-c", "1", "--b_c", "2"])


@pytest.mark.parametrize("text", ['"mlp.up" = 4', "mlp.up = 4", "mlp = {up = 4}"])
def test_a_rule_with_dots_is_a_key_or_a_path_of_tables(tmp_path, text):
    (tmp_path / "a.toml").write_text(f"[method.rank_pattern]\n{text}\nv_proj = 2\n")
    method = resolve(read_config(tmp_path / "a.toml"), "--method.rank_pattern.v_proj", "3").method
    assert method.rank_pattern == {"mlp.up": 4, "v_proj": 3}
    changed = resolve(read_config(tmp_path / "a.toml"), "--method.rank_pattern.mlp.up", "8").method
    assert changed.rank_pattern == {"mlp.up": 8, "v_proj": 2}


def test_flags_are_written_over_the_file_and_leave_it_alone():
    tree = {"data": "a", "train": {"epochs": 2, "seed": 1}}
    assert override(tree, {"train.epochs": "3", "valid": "b"}) == {
        "data": "a",
        "valid": "b",
        "train": {"epochs": "3", "seed": 1},
    }
    assert tree == {"data": "a", "train": {"epochs": 2, "seed": 1}}


def test_a_flag_below_a_value_is_an_error():
    with pytest.raises(ValueError, match=r"--train\.seed\.x: seed is a value, not a table"):
        resolve({"train": {"seed": 1}}, "--train.seed.x", "2")


@pytest.mark.parametrize("tree", [{"method": "full"}, {"method": {"name": "full"}}])
def test_a_method_is_given_by_name_or_as_a_table(tree):
    assert resolve(tree).method == Full()


@pytest.mark.parametrize("method", [["lora"], None, 3])
def test_a_method_that_is_no_table_is_an_error_also_beside_a_flag(method):
    with pytest.raises(ValueError, match="method is "):
        resolve({"method": method}, "--method", "full")


def test_a_method_by_flag_takes_its_fields_by_flag():
    assert resolve({}, "--method", "lora", "--method.r", "16").method == LoRA(r=16)
    assert resolve({"method": "lora"}, "--method.r", "16").method == LoRA(r=16)
    assert resolve({"method": {"alpha": 3}}, "--method=lora", "--method.r=16").method == LoRA(r=16, alpha=3)


@pytest.mark.parametrize("table", [{"name": "lora", "r": 4}, {"r": 4}], ids=["named", "by default"])
@pytest.mark.parametrize("flag", ["--method", "--method.name"])
def test_another_method_drops_the_fields_of_the_first(table, flag):
    assert resolve({"method": table}, flag, "full").method == Full()


@pytest.mark.parametrize("words", [["--method=lora", "--method.r=16"], ["--method.r=16", "--method=lora"]])
def test_the_order_of_flags_does_not_matter(words):
    assert resolve({"method": "full"}, *words).method == LoRA(r=16)


TUPLES = [
    ("q,v", ("q", "v")),
    (" q , v,", ("q", "v")),
    ("q", ("q",)),
    ("", ()),
    (["q", "v"], ("q", "v")),
    ([0, 3], ("0", "3")),
    ([], ()),
    (["a{1,2}"], ("a{1,2}",)),
]


@pytest.mark.parametrize("value, expected", TUPLES)
def test_a_list_is_given_as_a_list_or_as_text_with_commas(value, expected):
    assert resolve({"method": {"target_modules": value}}).method.target_modules == expected


def test_one_number_is_a_list_of_one_as_it_is_in_python():
    assert resolve({}, "--method.layers_to_transform", "3").method == LoRA(layers_to_transform=3)
    assert resolve({"method": {"layers_to_transform": 3}}).method == LoRA(layers_to_transform=3)


@pytest.mark.parametrize("text, value", [("true", True), ("True", True), ("false", False), ("FALSE", False)])
def test_booleans_are_read_from_text(text, value):
    assert resolve({}, "--method.rslora", text).method.rslora is value


def test_a_whole_number_in_place_of_a_fraction_becomes_one():
    alpha = resolve({"method": {"alpha": 32}}).method.alpha
    assert (alpha, type(alpha)) == (32.0, float)


def test_toml_and_json_files_give_the_same_tables(tmp_path):
    (tmp_path / "a.toml").write_text('data = "é"\n[train]\nepochs = 2\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('{"data": "é", "train": {"epochs": 2}}', encoding="utf-8")
    assert (
        read_config(tmp_path / "a.toml")
        == read_config(str(tmp_path / "a.json"))
        == {"data": "é", "train": {"epochs": 2}}
    )


BROKEN = {
    "toml cut off": ("a.toml", b"data = ", "is not TOML"),
    "toml key twice": ("a.toml", b"a = 1\na = 2", "is not TOML"),
    "toml not UTF-8": ("a.toml", b"a = '\xe9'", "is not TOML"),
    "json cut off": ("a.json", b"{", "is not JSON"),
    "json not UTF-8": ("a.json", b'"\xe9"', "is not JSON"),
    "json nested too deeply": ("a.json", b"[" * 100_000, "is not JSON"),
    "json list": ("a.json", b"[1]", "holds a list, not a table of settings"),
}


@pytest.mark.parametrize("name, content, reason", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_an_error_that_names_it(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} {reason}"):
        read_config(tmp_path / name)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such config file"):
        read_config(tmp_path / "nowhere.toml")
