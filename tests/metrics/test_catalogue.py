"""Every metric: its docstring says what it must, and its example runs; the verb; the import."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import minift.metrics
from minift.cli import main
from minift.metrics import FAMILIES
from minift.metrics.catalogue import METRICS, explain, listing

EVERY = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


@EVERY
def test_a_docstring_has_the_formula_the_range_the_use_the_lie_the_source_and_an_example(metric):
    text = metric.__doc__
    first, _, rest = text.partition("\n")
    assert first.endswith(".") and rest.startswith("\n"), "one sentence, then an empty line"
    places = [text.find(f"\n    {word}: ") for word in ("Range", "Use", "Lies", "Source")]
    assert -1 not in places and places == sorted(places), places
    assert "=" in text[: places[0]], "a formula before the range"
    assert text.find("\n    >>> ") > places[-1], "an example at the end"


@EVERY
def test_the_example_gives_what_it_shows(metric):
    module = sys.modules[metric.__module__]
    (example,) = doctest.DocTestFinder(recurse=False).find(metric, globs=dict(vars(module)))
    found = doctest.DocTestRunner().run(example)
    assert found.attempted and not found.failed


def test_the_examples_of_the_readme_give_what_their_comments_say():
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = text[text.index("from minift.metrics import ") :].partition("```")[0]
    names, promised = {}, 0
    for line in filter(None, code.splitlines()):
        statement, _, comment = line.partition("  # ")
        if line.startswith(("from", "state =")):
            exec(statement, names)
            continue
        found = eval(
            statement.removeprefix("print(").removesuffix(")") if "print(" in line else statement, names
        )
        if comment:
            promised += 1
            said = comment.partition("...")[0].partition(", that of")[0].partition(": precision")[0]
            assert str(found).startswith(said), (statement, found)
    assert promised == 5


def test_every_public_name_is_a_metric_or_known():
    others = {"FAMILIES", "MetricWarning", "State", "final_number"}
    assert set(minift.metrics.__all__) == set(METRICS) | others
    assert sum(map(len, FAMILIES.values())) == len(METRICS), "a metric stands in one family only"


def test_the_list_names_every_metric_and_an_explanation_is_the_docstring(capsys):
    assert main(["metrics", "list"]) == 0
    assert capsys.readouterr().out == listing() + "\n"
    assert all(f"  {name} " in listing() for name in METRICS)
    assert main(["metrics", "explain", "accuracy"]) == 0
    out = capsys.readouterr().out
    assert (
        out == explain("accuracy") + "\n"
        and "Its file:" in out
        and out.startswith("accuracy(y_true, y_pred) -> float\n\n")
    )
    assert "accuracy = rows with y_pred = y_true / rows" in out and "1 % positives" in out


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["explain"], "give `minift metrics list`, or `minift metrics explain NAME`"),
        (["list", "f1"], "give `minift metrics list`, or `minift metrics explain NAME`"),
        (["explain", "acuracy"], "unknown metric 'acuracy'; nearest: ['accuracy'"),
    ],
)
def test_what_is_no_metric_is_one_sentence(words, sentence, capsys):
    assert main(["metrics", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_verb_needs_no_torch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run([sys.executable, "-B", "-m", "minift.cli", "metrics", "list"], capture_output=True)
    assert done.returncode == 0 and b"balanced_accuracy" in done.stdout


def test_the_package_imports_numpy_and_the_standard_library_alone(tmp_path, monkeypatch):
    program = (
        "import numpy, sys, time\nbefore = set(sys.modules)\n"
        "start = time.process_time()\nimport minift.metrics\n"
        "spent = time.process_time() - start\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(spent, sorted(new - set(sys.stdlib_module_names)))"
    )
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))  # as installed: compiled once
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(16)
    ]
    assert all(run.split(maxsplit=1)[1] == "['minift']\n" for run in runs)
    assert min(float(run.split()[0]) for run in runs) <= 0.05  # seconds of processor time beyond numpy
