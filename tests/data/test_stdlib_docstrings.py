"""The data set of the standard library's functions: on the real library, and on a small one made here."""

import ast
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.data import stdlib_docstrings
from minift.data.stdlib_docstrings import (
    HELD_OUT_PER_MODULE,
    QUESTION,
    SENTENCE_CHARACTERS,
    SOURCE_CHARACTERS,
    first_sentence,
    pairs,
    split,
)


@pytest.fixture(scope="module")
def rows():
    return pairs()


def source(row: dict) -> str:
    assert row["prompt"].endswith(QUESTION)
    return row["prompt"].removesuffix(QUESTION)


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the count is that of Python 3.11")
def test_the_library_gives_thousands_of_rows_from_hundreds_of_modules(rows):
    assert len(rows) > 2000
    assert len({row["module"] for row in rows}) > 200


def test_sources_and_sentences_have_the_wanted_sizes(rows):
    for row in rows:
        assert SOURCE_CHARACTERS[0] <= len(source(row)) <= SOURCE_CHARACTERS[1]
        assert SENTENCE_CHARACTERS[0] <= len(row["completion"]) <= SENTENCE_CHARACTERS[1]


def test_every_prompt_is_one_function_without_its_docstring(rows):
    for row in rows:
        (function,) = ast.parse(source(row)).body
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(function) is None


def test_no_source_and_no_sentence_appears_twice(rows):
    assert len({row["prompt"] for row in rows}) == len({row["completion"] for row in rows}) == len(rows)


def test_no_row_comes_from_tests_or_installed_packages(rows):
    parts = {part for row in rows for part in row["module"].split(".")}
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__init__"}


def test_the_real_rows_split_by_module(rows):
    train, test = split(rows, 200)
    taken = Counter(row["module"] for row in test)
    assert taken.total() == 200 and max(taken.values()) == HELD_OUT_PER_MODULE
    assert not taken.keys() & {row["module"] for row in train}
    assert len(train) > len(rows) / 2


modules = st.lists(st.sampled_from("abcd"), max_size=30)


@given(modules, st.integers(0, 20), st.integers(0, 5))
def test_a_split_keeps_modules_apart_and_takes_few_rows_of_each(names, held_out, seed):
    all_rows = [{"module": name, "prompt": i} for i, name in enumerate(names)]
    train, test = split(all_rows, held_out, seed)
    taken = Counter(row["module"] for row in test)
    assert max(taken.values(), default=0) <= HELD_OUT_PER_MODULE
    assert len(test) == held_out or (len(test) < held_out and not train)
    assert sorted(row["prompt"] for row in train) == [
        row["prompt"] for row in all_rows if row["module"] in {t["module"] for t in train}
    ]
    assert not taken.keys() & {row["module"] for row in train}
    assert split(all_rows, held_out, seed) == (train, test)


def test_a_split_depends_on_the_seed():
    all_rows = [{"module": str(i // 3), "prompt": i} for i in range(60)]
    tests = {tuple(row["prompt"] for row in split(all_rows, 9, seed)[1]) for seed in range(20)}
    assert len(tests) == 20


SENTENCES = [
    ("Return the sum.", "Return the sum."),
    ("Return the sum. It is fast.", "Return the sum."),
    ("Return the first, i.e. the oldest, one. Then more.", "Return the first, i.e. the oldest, one."),
    ("Return some, e.g. a list. Then more.", "Return some, e.g. a list."),
    ("Follow version 1.2 of the rules. Then more.", "Follow version 1.2 of the rules."),
    ("Is it true? Then yes.", "Is it true?"),
    ("Stop at once! Then more.", "Stop at once!"),
    ("Return a\n    wrapped\tline.\n\n    Then more.", "Return a wrapped line."),
    ("Return without a full stop\n  \n  Then more.", "Return without a full stop"),
    ("\n\n  Return after blank lines.", "Return after blank lines."),
    ("", ""),
]


@pytest.mark.parametrize("docstring, sentence", SENTENCES)
def test_the_first_sentence_ends_at_a_full_stop_before_a_capital_or_with_its_paragraph(docstring, sentence):
    assert first_sentence(docstring) == sentence


@given(st.text(alphabet="aB.!?\n \t"))
def test_the_first_sentence_is_the_beginning_of_the_docstring_on_one_line(docstring):
    sentence = first_sentence(docstring)
    assert " ".join(docstring.split()).startswith(sentence)
    assert sentence == " ".join(sentence.split())


BODY = """    total = 0
    for value in values:
        total += value
    return {name!r}, total
"""


def function(name: str, sentence: str) -> str:
    return f'def {name}(values):\n    """{sentence}\n\n    More about it.\n    """\n' + BODY.format(name=name)


def row(module: str, name: str, sentence: str) -> dict:
    prompt = f"def {name}(values):\n{BODY.format(name=name)}".strip() + QUESTION
    return {"prompt": prompt, "completion": sentence, "module": module}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Writes a file of the small library, which pairs() then reads."""
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(stdlib_docstrings, "sysconfig", SimpleNamespace(get_paths=lambda: paths))

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return write


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def test_a_function_becomes_its_source_and_the_first_sentence_of_its_docstring(library):
    library("sums.py", function("add", "Return the name and the sum."))
    assert pairs() == [row("sums", "add", "Return the name and the sum.")]


def test_a_method_is_dedented_and_its_decorators_are_left_out(library):
    method = "@staticmethod\n" + function("add", "Return the name and the sum.")
    library("sums.py", "class Sums:\n" + indented(method))
    assert pairs() == [row("sums", "add", "Return the name and the sum.")]


def test_a_package_is_named_by_its_folder(library):
    library("sums/__init__.py", function("add", "Return the name and the sum."))
    library("sums/more.py", function("plus", "Return the name and the sum again."))
    assert [r["module"] for r in pairs()] == ["sums", "sums.more"]


def test_functions_without_docstring_or_without_anything_else_give_no_row(library):
    only_doc = 'def empty():\n    """Return nothing at all, ever."""\n'
    library("sums.py", "def add(values):\n" + BODY.format(name="add") + only_doc)
    assert pairs() == []


@pytest.mark.parametrize(
    "name",
    [
        "test/sums.py",
        "a/tests/sums.py",
        "site-packages/sums.py",
        "sums.txt",
        "idlelib/sums.py",
        "test_sums.py",
    ],
)
def test_tests_and_installed_packages_are_left_out(library, name):
    library(name, function("add", "Return the name and the sum."))
    library("other.py", function("plus", "Return the name and the sum again."))
    assert [r["module"] for r in pairs()] == ["other"]


@pytest.mark.parametrize("first", [b"def broken(:\n", b"# caf\xe9\n", b"x = '\0'\n"])
def test_a_file_that_cannot_be_parsed_is_skipped(library, first):
    good = function("add", "Return the name and the sum.")
    library("bad.py", first + good.encode())
    library("sums.py", good)
    assert [r["module"] for r in pairs()] == ["sums"]


def test_an_equal_source_or_an_equal_sentence_is_taken_once(library):
    library("a.py", function("add", "Return the name and the sum."))
    library("b.py", function("add", "Return another sentence for the same."))
    library("c.py", function("plus", "Return the name and the sum."))
    assert pairs() == [row("a", "add", "Return the name and the sum.")]


def test_rows_come_module_by_module(library):
    library("b.py", function("add", "Return the name and the sum."))
    method = indented(function("first", "Return what stands in the first lines."))
    library("a.py", f"class Sums:\n{method}\n{function('second', 'Return what stands further down.')}")
    assert [r["module"] for r in pairs()] == ["a", "a", "b"] and pairs() == pairs()


def test_rows_do_not_depend_on_the_order_of_sets(library, tmp_path):
    for name in "abcdef":
        library(
            f"{name}.py",
            "".join(function(f"{name}{i}", f"Return number {i} of {name} in words.") for i in range(4)),
        )
    program = (
        "import sys, types; from minift.data import stdlib_docstrings as s;"
        "s.sysconfig = types.SimpleNamespace(get_paths=lambda: {'stdlib': sys.argv[1]});"
        "print(s.split(s.pairs(), 5))"
    )
    command = [sys.executable, "-B", "-c", program, str(tmp_path)]
    runs = {
        subprocess.run(
            command, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": str(seed)}
        ).stdout
        for seed in range(3)
    }
    assert runs == {f"{split(pairs(), 5)}\n"}
    assert len(pairs()) == 24
