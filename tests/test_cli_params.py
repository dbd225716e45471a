"""`minift params` and `minift plan` from the command line: settings in every spelling, errors, speed."""

import json
import subprocess
import sys

import pytest
from conftest import tiny_llama

import minift
from minift import cli, load
from minift.config import place_bare

LINE = "trainable params: 4,194,304 || all params: 6,742,609,920 || trainable%: 0.0622"
LLAMA = ["params", "--model", "llama-2-7b", "--method", "lora"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny model and a config of a run, in the current folder."""
    minift.save_model(tiny_llama(), tmp_path / "model")
    (tmp_path / "run.toml").write_text(
        'model = "model"\ndata = "rows.jsonl"\n[method]\nname = "lora"\nr = 2\n'
        "[method.rank_pattern]\nself_attn.v_proj = 1\n[train]\nepochs = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *words) -> str:
    assert cli.main(list(words)) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return said.out


SPELLINGS = [
    ["--r", "8", "--target-modules", "q_proj,v_proj"],
    ["--method.r", "8", "--method.target_modules", "q_proj,v_proj"],
    ["--r=8", "--target_modules=q_proj,v_proj"],
    ["--method.r=8", "--r=8", "--method.target-modules", "q_proj,v_proj"],
]


@pytest.mark.parametrize("words", SPELLINGS, ids=" ".join)
def test_a_field_of_the_method_is_named_bare_or_with_its_path(capsys, words):
    out = run(capsys, *LLAMA, *words)
    assert LINE in out.split("\n") and "64 x 8 (4096 + 4096) = 4,194,304" in out.split("\n")


@pytest.mark.parametrize(
    "config", [["run.toml"], ["--config", "run.toml"], ["run.toml", "--config=run.toml"]]
)
@pytest.mark.parametrize("verb", ["plan", "params"])
def test_a_config_stands_first_or_behind_its_flag(folder, capsys, verb, config):
    out = run(capsys, verb, *config)
    assert "trainable params: 352 ||" in out  # 2 (2 (32 + 32) + 1 (32 + 16))
    out = run(capsys, verb, *config, "--r", "1", "--target-modules", "v_proj,o_proj")
    assert "trainable params: 224 ||" in out  # 2 (1 (32 + 16) + 1 (32 + 32))


def test_a_field_of_the_method_may_be_named_alone_where_that_is_asked_for():
    tree = {"method": "dora"}
    assert place_bare(tree, {"r": "4", "rank_pattern.mlp.up": "2", "data": "a"}) == {
        "method.r": "4", "method.rank_pattern.mlp.up": "2", "data": "a"
    }  # fmt: skip
    prompts = {"method": "prompt_tuning", "num_virtual_tokens": "8"}
    placed = {"method.name": "prompt_tuning", "method.num_virtual_tokens": "8"}
    assert place_bare(tree, prompts) == place_bare({}, prompts) == placed
    with pytest.raises(ValueError, match=r"unknown setting --r, neither of a run nor of method full"):
        place_bare(tree, {"method": "full", "r": "4"})
    with pytest.raises(ValueError, match="--r 4 and --method.r 5 set the same and contradict each other"):
        place_bare(tree, {"r": "4", "method.r": "5"})
    with pytest.raises(ValueError, match=r"method\.name is 'x'; known methods: full"):
        place_bare(tree, {"method": "x"})


def test_the_rank_of_single_rules_is_a_flag_too(folder, capsys):
    words = ["--rank-pattern.layers.0.self_attn.q_proj", "4", "--method.rank_pattern.self_attn.v_proj", "3"]
    rows = [line.split() for line in run(capsys, "plan", "run.toml", *words).split("\n")[1:5]]
    assert [(row[0][13:], row[2]) for row in rows] == [
        ("0.self_attn.q_proj", "4"),
        ("0.self_attn.v_proj", "3"),
        ("1.self_attn.q_proj", "2"),
        ("1.self_attn.v_proj", "3"),
    ]


def test_a_plan_is_one_row_for_each_module_and_can_be_compared(folder, capsys):
    first = run(capsys, "plan", "run.toml", "--quantize", "nf4")
    assert first == run(capsys, "plan", "run.toml", "--quantize.format", "nf4")
    assert first.split("\n") == [
        "module                           rule    r  alpha  scaling  dtype    base  parameters",
        "model.layers.0.self_attn.q_proj  q_proj  2     16        8  float32  nf4          128",
        "model.layers.0.self_attn.v_proj  v_proj  1     16       16  float32  nf4           48",
        "model.layers.1.self_attn.q_proj  q_proj  2     16        8  float32  nf4          128",
        "model.layers.1.self_attn.v_proj  v_proj  1     16       16  float32  nf4           48",
        "trainable params: 352 || all params: 22,080 || trainable%: 1.5942",
        "",
    ]
    other = run(capsys, "plan", "run.toml", "--quantize", "nf4", "--rank-pattern.self_attn.v_proj", "2")
    changed = [a for a, b in zip(first.split("\n"), other.split("\n"), strict=True) if a != b]
    assert [line.split()[0] for line in changed] == [
        "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj", "trainable"
    ]  # fmt: skip


def test_json_and_rows_by_layer(folder, capsys):
    said = json.loads(run(capsys, "params", "run.toml", "--json", "--by", "layer"))
    assert [row["name"] for row in said["rows"]][1:3] == ["model.layers.0", "model.layers.1"]
    assert said["method"]["rank_pattern"] == {"self_attn.v_proj": 1}
    table = run(capsys, "params", "run.toml", "--by=module").split("\n")
    assert sum(line.startswith("model.layers.1.self_attn.") for line in table) == 4


def test_nothing_reads_weights(folder, capsys, monkeypatch):
    def no_weights(*_):
        raise AssertionError("weights were read")

    real = load.weights.StoredTensor
    monkeypatch.setattr(load.weights, "StoredTensor", lambda shape, rows: real(shape, no_weights))
    for verb in ("plan", "params"):
        assert "trainable params: 352 ||" in run(capsys, verb, "run.toml", "--quantize", "nf4")


BAD = {
    "nothing": (["params"], "minift params needs a CONFIG.toml, or --model NAME and --method NAME"),
    "two configs": (["plan", "a.toml", "--config", "b.toml"], "two configs are given, a.toml and b.toml"),
    "no config": (["plan", "nowhere.toml"], "nowhere.toml: no such config file"),
    "unknown model": (
        ["params", "--model", "llama-2-7c"],
        "no model 'llama-2-7c': give a preset (nearest: llama-2-7b, llama-2-70b",
    ),
    "unknown method": ([*LLAMA[:-1], "lroa"], "method.name is 'lroa'; known methods: full, selective, lora"),
    "unknown field": (
        [*LLAMA, "--target-module", "q_proj"],
        "unknown setting --target_module, neither of a run nor of method lora; did you mean",
    ),
    "field of another method": (
        [*LLAMA, "--num-virtual-tokens", "8"],
        "unknown setting --num_virtual_tokens, neither of a run nor of method lora",
    ),
    "contradiction": (
        [*LLAMA, "--r", "8", "--method.r", "16"],
        "--r 8 and --method.r 16 set the same and contradict each other",
    ),
    "two names": (
        [*LLAMA, "--method.name", "dora"],
        "--method lora and --method.name dora set the same and contradict each other",
    ),
    "given twice": (
        [*LLAMA, "--target-modules", "q_proj", "--target_modules", "v_proj"],
        "--target_modules is given twice, as 'q_proj' and 'v_proj'",
    ),
    "dead rule": (
        ["plan", "run.toml", "--target-modules", "v_proj,query"],
        "target_modules ['query'] match no linear layer",
    ),
    "dead layers": (["plan", "run.toml", "--layers-to-transform", "5"], "'5' is outside the blocks 0-1"),
    "dead pattern": (["plan", "run.toml", "--rank-pattern.o_proj", "2"], "rank_pattern ['o_proj']"),
    "dead quantization": (
        ["plan", "run.toml", "--quantize", "nf4", "--quantize.skip", "head"],
        "skip ['head'] match no linear layer; nearest: ['lm_head'",
    ),
    "wrong way": (["params", "run.toml", "--by", "block"], "--by 'block' is not one of layer, module"),
    "by is of params": (["plan", "run.toml", "--by", "layer"], "unknown setting --by"),
    "pattern is a table": (
        ["plan", "run.toml", "--rank-pattern", "4"],
        "method.rank_pattern is '4', expected a table",
    ),
}  # fmt: skip


@pytest.mark.parametrize("words, sentence", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_status_2(folder, capsys, words, sentence):
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minift: ") and sentence in said.err
    assert said.err.count("\n") == 1 and said.out == ""


@pytest.mark.parametrize("model, count", [("llama-2-7b", "4,194,304"), ("gpt2", "294,912")])
def test_a_count_takes_less_than_two_seconds_beyond_torch(model, count):
    program = (
        "import sys, time, torch; start = time.process_time(); from minift import cli; "
        "status = cli.main(sys.argv[1:]); print(time.process_time() - start, status)"
    )
    target = "c_attn" if model == "gpt2" else "q_proj,v_proj"
    words = ["params", "--model", model, "--method", "lora", "--r", "8", "--target-modules", target]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    seconds, status = done.stdout.split()[-2:]
    assert f"trainable params: {count} ||" in done.stdout and status == "0"
    assert float(seconds) < 2.0
