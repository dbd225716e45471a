"""A data set that every Python installation holds: functions of the standard library and what they do.

prompt: a function's source with its docstring taken out; completion: the docstring's first sentence.
Deterministic for one Python version; nothing is imported or run, modules are parsed as text.
"""

import ast
import random
import re
import sysconfig
from pathlib import Path

SOURCE_CHARACTERS = (80, 900)
SENTENCE_CHARACTERS = (20, 120)
LEFT_OUT = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "turtledemo",
    "ensurepip",
    "__pycache__",
}
QUESTION = "\n\nWhat does this function do?\n"
HELD_OUT_PER_MODULE = 3


def pairs() -> list[dict]:
    """All rows, by module: prompt, completion, module. A repeated source or sentence appears once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    rows, sources, sentences = [], set(), set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if LEFT_OUT & set(parts) or parts[-1].startswith("test_"):
            continue
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        for source, sentence in _functions(path):
            if source not in sources and sentence not in sentences:
                sources.add(source)
                sentences.add(sentence)
                rows.append({"prompt": source + QUESTION, "completion": sentence, "module": module})
    return rows


def split(rows: list[dict], held_out: int, seed: int = 0) -> tuple[list[dict], list[dict]]:
    """(train, held out), both in a seeded order, no module on both sides.

    Modules are held out in a seeded order, and at most HELD_OUT_PER_MODULE rows of each are used, so that the
    evaluation is not about one large module.
    """
    shuffle = random.Random(seed).shuffle
    by_module = {}
    for row in rows:
        by_module.setdefault(row["module"], []).append(row)
    modules = sorted(by_module)
    shuffle(modules)
    test, taken = [], set()
    for module in modules:
        if len(test) >= held_out:
            break
        members = list(by_module[module])
        shuffle(members)
        test += members[:HELD_OUT_PER_MODULE]
        taken.add(module)
    train = [row for row in rows if row["module"] not in taken]
    shuffle(train)
    shuffle(test)
    return train, test[:held_out]


def _functions(path: Path):
    """(source without docstring, first sentence) of the functions in a file that have the wanted sizes."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    lines = text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if docstring is None:
            continue
        sentence = first_sentence(docstring)
        source = _without_docstring(lines, node)
        if (
            SOURCE_CHARACTERS[0] <= len(source) <= SOURCE_CHARACTERS[1]
            and SENTENCE_CHARACTERS[0] <= len(sentence) <= SENTENCE_CHARACTERS[1]
        ):
            yield source, sentence


def first_sentence(docstring: str) -> str:
    """The first paragraph up to its first . ! or ? before a space and no lower-case letter, on one line."""
    paragraph = " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())
    return re.split(r"(?<=[.!?])\s(?=[^a-z])", paragraph, maxsplit=1)[0]


def _without_docstring(lines: list[str], node) -> str:
    """The lines of a function, decorators left out and dedented, minus those of its docstring."""
    first, doc, last = node.lineno - 1, node.body[0], node.end_lineno
    kept = lines[first : doc.lineno - 1] + lines[doc.end_lineno : last]
    indent = min((len(line) - len(line.lstrip()) for line in kept if line.strip()), default=0)
    return "\n".join(line[indent:].rstrip() for line in kept).strip()
