"""`minift rank` on adapter folders: what it reads, refuses, changes and keeps."""

import json

import pytest
import torch
from conftest import tiny_llama
from mutants import survives
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minift
from minift import cli
from minift.methods import METHODS
from minift.methods.lora import LoRA
from minift.reports import ranks

IDS = torch.arange(20).view(2, 10) % 97
Q0, V1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
METHOD = LoRA(r=3, alpha=5.0, rank_pattern={"v_proj": 2}, alpha_pattern={V1: 7.0})


def moved(method, **config):
    """A tiny model with an adapter that is not at its start."""
    torch.manual_seed(0)
    model = tiny_llama(**config)
    minift.apply(model, method)
    with torch.no_grad():
        for part in model.adapters["default"].parts:
            for p in part.parameters(recurse=False):
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    minift.save_adapter(moved(METHOD), "adapter", template="none")
    return tmp_path


def facts_of(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return file.metadata()


def loaded(folder, **config):
    model = tiny_llama(**config)
    minift.load_adapter(model, folder)
    return model


def deltas(model):
    parts = model.adapters["default"].modules
    return {
        p: m.fold({"weight": torch.zeros(m.base.weight.shape).double()})["weight"] for p, m in parts.items()
    }


def check(module):
    """What `set` writes loads, with the nearest deltas of the wanted ranks, the same scalings and facts."""
    old, before = deltas(loaded("adapter")), facts_of(ranks.Path("adapter"))
    for number, (verb, wanted) in enumerate(
        [("shrink", 1), ("grow", 5), ("set", {"q_proj": 2, V1: 4}), ("set", {"model.layers.0.*": 4})]
    ):
        new = module.rank(verb, "adapter", wanted, output=f"new{number}")
        model = loaded(f"new{number}")
        for path, delta in deltas(model).items():
            S = torch.linalg.svdvals(old[path])
            part = model.adapters["default"].modules[path]
            assert part.r == len(part.lora_A) == new[path]
            # the factors are rounded to fp32: r products of rounded numbers against the largest
            slack = (new[path] + 2) * 2.0**-23 * S[0]
            assert abs((delta - old[path]).norm() - S[new[path] :].norm()) <= slack
        facts = facts_of(ranks.Path(f"new{number}"))
        assert facts.keys() == before.keys()
        same = facts.keys() - {"minift.scaling"}
        assert all(facts[name] == before[name] for name in same) and "minift.template" in same
        ledger, was = json.loads(facts["minift.scaling"]), json.loads(before["minift.scaling"])
        plan = model.adapters["default"].plan
        assert ledger == {site.path: site.scaling for site in plan.sites}
        assert ledger == pytest.approx(was, rel=2.0**-52)


def test_what_is_written_loads_with_the_nearest_deltas(folder):
    check(ranks)


@pytest.mark.parametrize(
    "old, new",
    [
        (
            "ledger[path] = method.scale(factors.r, alpha_for(method, factors))",
            "ledger[path] = method.scaling",
        ),
        ('"lora_A.weight": f.A, "lora_B.weight": f.B', '"lora_A.weight": f.A, "lora_B.weight": -f.B'),
        ('"r": method.r, "lora_alpha": method.alpha,', '"r": method.r,'),
        ('{"format": "pt", **stored.facts,', '{"format": "pt", '),
        ("config |= {", "dict() | {"),
        ('"minift.scaling": json.dumps(ledger)', '"minift.other": json.dumps(ledger)'),
        ("return Factors(A, B, method.scale(r, alpha))", "return Factors(A, B, method.scaling)"),
        ("method.alpha_pattern.get(first_fit(method.alpha_pattern, path), method.alpha)", "method.alpha"),
        ('if verb == "shrink" else row.after < row.before', 'if verb == "grow" else row.after < row.before'),
    ],
)
def test_mutants_are_noticed(folder, old, new):
    assert not survives(check, ranks, old, new)


def test_growing_keeps_every_bit_of_the_old_factors_and_shrinking_back_loses_nothing(folder, capsys):
    assert cli.main(["rank", "grow", "adapter", "--r", "6", "--output", "deep/grown"]) == 0
    old, new = (
        load_file("adapter/adapter_model.safetensors"),
        load_file("deep/grown/adapter_model.safetensors"),
    )
    for key, tensor in old.items():
        r = tensor.shape[0 if "lora_A" in key else 1]
        same, more = (new[key][:r], new[key][r:]) if "lora_A" in key else (new[key][:, :r], new[key][:, r:])
        assert torch.equal(same, tensor) and (more != 0).any() == ("lora_A" in key)
    said = capsys.readouterr().out
    assert "optimizer starts afresh" in said and "the adapter is in deep/grown" in said
    assert cli.main(["rank", "advise", "deep/grown", "--energy", "1"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("model.")]
    assert {row[0]: row[1:3] for row in rows}[Q0] == ["6", "3"]
    assert cli.main(["rank", "shrink", "deep/grown", "--energy", "1", "--output", "back"]) == 0
    a, b = deltas(loaded("adapter")), deltas(loaded("back"))
    for path in a:  # rounded once to fp32: as in check
        assert (a[path] - b[path]).norm() <= 5 * 2.0**-23 * a[path].norm()


def test_show_and_advise_print_every_layer_and_write_nothing(folder, capsys):
    assert cli.main(["rank", "show", "adapter"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["module", "r", "alpha", "scaling", "norm", "largest", "smallest"]
    parts = loaded("adapter").adapters["default"].modules
    S = torch.linalg.svdvals(deltas(loaded("adapter"))[V1])
    [row] = [line.split()[1:] for line in lines if line.startswith(V1)]
    assert row == ["2", "7", "3.5", f"{S.norm():.4e}", f"{S[0]:.4e}", f"{S[1]:.4e}"]
    total = sum(p.numel() for part in parts.values() for p in part.parameters(recurse=False))
    assert lines[-1] == f"parameters: {total:,}" and len(lines) == 6
    assert cli.main(["rank", "advise", "adapter", "--energy", "0.5"]) == 0
    assert "error%" in capsys.readouterr().out and [p.name for p in folder.iterdir()] == ["adapter"]


@pytest.mark.parametrize("tied", ["both", "untie"])
def test_embeddings_modules_to_save_and_rslora_survive(tmp_path, monkeypatch, tied):
    monkeypatch.chdir(tmp_path)
    fields = {"r": 2, "alpha": 3.0, "rslora": True, "modules_to_save": ["norm"], "tied": tied}
    base = {"tie_word_embeddings": True}
    minift.save_adapter(moved(LoRA(target_modules=["embed_tokens", "q_proj"], **fields), **base), "adapter")
    old = loaded("adapter", **base)(IDS)
    ranks.rank("grow", "adapter", {"embed_tokens": 5}, output="grown")
    model = loaded("grown", **base)
    embedding = model.adapters["default"].modules["model.embed_tokens"]
    assert embedding.lora_embedding_A.shape == (5, 97) and embedding.lora_embedding_B.shape == (32, 5)
    # the sums run over three zeros more, in another order; a-priori: 2 blocks x 7 products x 97 terms x 2^-24
    # = 8.1e-5 of the largest logit, of which this allows an eighth
    torch.testing.assert_close(model(IDS), old, rtol=0, atol=1e-5 * old.abs().max().item())
    again = load_file("grown/adapter_model.safetensors")
    assert torch.equal(
        again["base_model.model.model.norm.weight"],
        load_file("adapter/adapter_model.safetensors")["base_model.model.model.norm.weight"],
    )


def test_files_with_adapter_names_in_the_keys_and_in_bf16_are_read(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = {k.replace(".weight", ".default.weight"): t.bfloat16() for k, t in load_file(path).items()}
    save_file(tensors, path)  # without metadata, as others write it
    ranks.rank("set", "adapter", 2, output="new")
    assert set(load_file("new/adapter_model.safetensors")) == {k.replace(".default", "") for k in tensors}
    assert loaded("new").adapters["default"].method.r == 2
    save_file(tensors | {k.replace(".default", ""): t.clone() for k, t in tensors.items()}, path)
    with pytest.raises(ValueError, match="lora_. twice, under two adapter names"):
        ranks.rank("show", "adapter")


def edit_config(**changes):
    path = ranks.Path("adapter/adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(change, facts=None):
    path = ranks.Path("adapter/adapter_model.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, facts)


KEY = f"base_model.model.{Q0}.lora_A.weight"
BROKEN = [
    (lambda: edit_config(peft_type="LOHA"), "peft_type 'LOHA' is not supported"),
    (lambda: edit_config(use_dora=True), "adapter holds a dora adapter; minift rank edits lora"),
    (lambda: edit_config(peft_type="IA3", target_modules=["k_proj"]), "is not supported|holds a ia3 adapter"),
    (
        lambda: edit_config(r=4),
        f"{Q0} has rank 3 and 3 in adapter_model.safetensors, adapter_config.json says 4",
    ),
    (lambda: edit_config(lora_alpha=6.0), "says scaling 2.0 for model.layers.0.self_attn.q_proj"),
    (lambda: edit_config(use_rslora=True), "the two files belong to different adapters"),
    (lambda: edit_config(init_lora_weights="pissa"), "init_lora_weights = 'pissa' changed the base weights"),
    (lambda: edit_tensors(lambda t: t.pop(KEY)), r"holds lora_B \(32, 3\) of .*q_proj, which is no pair"),
    (lambda: edit_tensors(lambda t: t.update(x=torch.zeros(1))), "has an unexpected tensor, x"),
    (
        lambda: edit_tensors(lambda t: t.update({"base_model.model.norm.weight": torch.zeros(1)})),
        "has an unexpected tensor, base_model.model.norm.weight",
    ),
    (lambda: edit_tensors(lambda t: t[KEY].fill_(float("inf"))), f"the adapter at {Q0} is not finite"),
    (lambda: edit_tensors(lambda t: t.update({KEY: t[KEY].int()})), "is torch.int32; adapters are floating"),
    (lambda: edit_tensors(lambda t: t.update({KEY: t[KEY][0]})), r"lora_A \(32,\), lora_B"),
    (
        lambda: edit_tensors(lambda t: None, {"minift.scaling": "[]"}),
        "minift.scaling in the metadata is no table",
    ),
    (lambda: edit_tensors(dict.clear), "holds no factors"),
]


@pytest.mark.parametrize("breaks, message", BROKEN)
def test_files_that_do_not_fit_are_refused_and_nothing_is_written(folder, breaks, message):
    breaks()
    with pytest.raises(ValueError, match=message):
        ranks.rank("set", "adapter", 2, output="new")
    assert [p.name for p in folder.iterdir()] == ["adapter"]


def test_a_dora_folder_and_a_missing_one_are_refused(folder):
    minift.save_adapter(moved(METHODS["dora"](r=2)), "dora")
    with pytest.raises(ValueError, match="dora holds a dora adapter; minift rank edits lora"):
        ranks.rank("show", "dora")
    with pytest.raises(ValueError, match="nowhere/adapter_config.json is missing"):
        ranks.rank("show", "nowhere")


@pytest.mark.parametrize(
    "words, message",
    [
        (["list", "adapter"], "minift rank list is not known; known: show, advise, set, shrink, grow"),
        (["show", "adapter", "--energy", "0.9"], "minift rank show changes nothing"),
        (["advise", "adapter", "--r", "2"], "minift rank advise changes nothing"),
        (["advise", "adapter", "--energy", "2"], "energy is 2.0; it is a share above 0 and at most 1"),
        (["set", "adapter", "--r", "2"], "minift rank set needs an output"),
        (["set", "adapter", "--output", "new"], "minift rank set needs r or energy"),
        (["set", "adapter", "--r", "2", "--energy", "0.9", "--output", "new"], "needs r or energy"),
        (["set", "adapter", "--r", "2", "--output", "adapter"], "output adapter exists already"),
        (["set", "adapter", "--r", "two", "--output", "new"], "--r two is neither one rank"),
        (["set", "adapter", "--r", "2", "3", "--output", "new"], "--r 2 3 is neither one rank"),
        (["set", "adapter", "--r", "=2", "--output", "new"], "--r =2 is neither one rank"),
        (["set", "adapter", "--r", "0", "--output", "new"], "is 0; a rank is a whole number"),
        (["set", "adapter", "--r", "x_proj=2", "--output", "new"], r"r \['x_proj'\] fits no layer"),
        (
            ["set", "adapter", "--r", "17", "--output", "new"],
            r"above the smaller side of .*v_proj \(16 x 32\)",
        ),
        (["shrink", "adapter", "--r", "3", "--output", "new"], "v_proj has rank 2, and 3 is above it"),
        (["grow", "adapter", "--r", "2", "--output", "new"], "q_proj has rank 3, and 2 is below it"),
    ],
)
def test_wrong_words_are_one_sentence_and_write_nothing(folder, capsys, words, message):
    assert cli.main(["rank", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ranks.re.search(message, said)
    assert [p.name for p in folder.iterdir()] == ["adapter"]


def test_ranks_by_rule_on_the_command_line(folder):
    assert cli.main(["rank", "set", "adapter", "--r", "q_proj=1", f"{V1}=4", "--output", "new"]) == 0
    found = {p: m.r for p, m in loaded("new").adapters["default"].modules.items()}
    assert list(found.values()) == [1, 2, 1, 4]


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(ranks, "write_text", fails)
    with pytest.raises(OSError, match="no space left"):
        ranks.rank("set", "adapter", 2, output="new")
    assert [p.name for p in folder.iterdir()] == ["adapter"]
