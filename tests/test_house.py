"""The rules of the house, held by a machine: budgets, import directions, kernels, words."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "minift").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
EVERYTHING = [
    *PACKAGE,
    *KERNELS,
    *sorted((ROOT / "benchmarks").rglob("*.py")),
    *sorted((ROOT / "tests").rglob("*.py")),
]

# Who may import whom (besides itself); "" stands for the modules directly in minift/.
MAY_IMPORT = {
    "kernels": set(),
    "metrics": set(),
    "data": set(),
    "reports": {"methods", "models", "data", "metrics", "quant", "load", "fetch", "kernels"},
    "optim": {"kernels"},
    "models": {"kernels"},
    "quant": {"models", "kernels"},
    "methods": {"models", "quant", "kernels"},
    "training": {"methods", "models", "data", "optim", "metrics", "reports", "memory", "kernels"},
    "fetch": set(),
    "memory": set(),
    "load": {"models", "quant", "data", "fetch", "memory"},
    "config": {"methods", "quant", "training"},
}
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "metrics": {"numpy"},
    "data": {"numpy", "torch", "tokenizers", "jinja2"},
    "models": {"torch", "numpy", "gguf"},
    "quant": {"torch"},
    "methods": {"torch"},
    "optim": {"torch"},
    "reports": {"numpy", "torch", "matplotlib"},
    "training": {"torch", "tqdm"},
    "fetch": set(),
    "config": set(),
    "load": {"torch"},
    "memory": {"torch"},
    "demo": set(),
    "cli": set(),
    "verbs": set(),
    "verbs_disk": set(),
    "words": set(),
}
OPTIONAL = {"gguf", "matplotlib"}  # the only imports inside functions
# The verbs import inside the verb's function, so that `minift fetch` and typing errors do not import torch.
IMPORTS_IN_FUNCTIONS = {"verbs.py", "verbs_disk.py", "words.py"}
# Not ops: the choice of backends, the quantized matrix, decoding, products in slabs, the C library.
SHARED_BY_KERNELS = ("__init__", "runtime", "packed", "decode", "slabs", "library")
LINES = {"models": 450, "kernels": 350}
FORBIDDEN = ("hugging face " + "peft inside", "to" + "do:", "fix" + "me", "x" + "xx ", "set" + "trace")


def place(path: Path) -> str:
    """The package of a file, or the module's own name for files directly in minift/."""
    if path in KERNELS:
        return "kernels"
    parts = path.relative_to(ROOT / "minift").parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path):
    """(module, inside a function) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in inner
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in inner


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_within_their_budgets(path):
    text = path.read_text(encoding="utf-8")
    limit = LINES.get(place(path), 300) if path in PACKAGE or path in KERNELS else 300
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            limit = 100 if path in KERNELS and node.name.endswith("_kernel") else 50
            assert node.end_lineno - node.lineno < limit, f"{node.name} has more than {limit} lines"


@pytest.mark.parametrize("path", [*PACKAGE, *KERNELS], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_in_their_direction(path):
    here = place(path)
    for module, inside in imports(path):
        top, *rest = module.split(".")
        if top == "minift":
            target = rest[0] if rest else ""
            allowed = target == here or here not in MAY_IMPORT or target in MAY_IMPORT[here]
            assert allowed and here != "__init__", f"{here} imports {module}"
            assert not inside or path.name in IMPORTS_IN_FUNCTIONS, f"{module} is imported inside a function"
        elif top not in sys.stdlib_module_names:
            assert top in THIRD_PARTY.get(here, set()), f"{here} imports {module}"
            assert inside == (top in OPTIONAL), (
                f"{module}: optional packages, and only they, inside functions"
            )


def test_the_import_graph_of_packages_has_no_cycle():
    edges = {p: set() for p in MAY_IMPORT}
    for path in [*PACKAGE, *KERNELS]:
        for module, _ in imports(path):
            if module.startswith("minift.") and place(path) in edges:
                target = module.split(".")[1]
                edges[place(path)] |= {target} - {place(path)}
    done = set()
    while ready := {p for p in edges if p not in done and edges[p] <= done}:
        done |= ready
    assert done == set(edges), f"cycle among {set(edges) - done}"


@pytest.mark.parametrize(
    "path", [p for p in KERNELS if p.stem not in SHARED_BY_KERNELS], ids=lambda p: p.stem
)
def test_a_kernel_has_a_reference_of_the_same_signature_a_test_and_a_benchmark(path):
    module = importlib.import_module(f"minift.kernels.{path.stem}")
    launcher, reference = getattr(module, path.stem), getattr(module, path.stem + "_ref")
    assert list(inspect.signature(launcher).parameters) == list(inspect.signature(reference).parameters)
    assert (ROOT / "tests" / "kernels" / f"test_{path.stem}.py").exists()
    assert (ROOT / "benchmarks" / f"bench_{path.stem}.py").exists()


def test_nothing_unpickles_or_opens_a_socket():
    banned = {
        "pickle",
        "marshal",
        "shelve",
        "joblib",
        "dill",
        "cloudpickle",
        "socket",
        "requests",
        "urllib",
        "httpx",
    }
    for path in [*PACKAGE, *KERNELS]:
        assert not {m.split(".")[0] for m, _ in imports(path)} & banned, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in {
                    ("torch", "load"),
                    ("torch", "save"),
                    ("np", "load"),
                }, path


def test_no_stale_words():
    for path in EVERYTHING:
        text = path.read_text(encoding="utf-8").lower()
        assert not [word for word in FORBIDDEN if word in text], path


def test_the_readme_tree_names_every_file_and_no_other():
    tree = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = tree[tree.index("```\nREADME.md") :]
    named = {word for word in tree[: tree.index("```", 4)].split() if word.endswith(".py")}
    real = {p.name for p in [*PACKAGE, *KERNELS, ROOT / "setup.py"] if p.name != "__init__.py"}
    real |= {p.name for p in (ROOT / "benchmarks").glob("*.py") if not p.name.startswith("__")}
    assert real - named == set() and named - real - {"__init__.py", "conftest.py", "test_house.py"} == set()


def test_every_public_name_resolves_and_an_unknown_one_lists_them():
    import minift

    for name in minift.__all__:
        assert getattr(minift, name) is not None
    with pytest.raises(AttributeError, match="load_model"):
        minift.no_such_name  # noqa: B018


def test_importing_minift_costs_little_beyond_torch():
    program = (
        "import torch, time; a = time.perf_counter(); import minift; b = time.perf_counter();"
        "[getattr(minift, n) for n in minift.__all__]; print(b - a, time.perf_counter() - a)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(3)
    ]
    assert min(float(r[0]) for r in runs) < 0.3
    assert min(float(r[1]) for r in runs) < 1.0  # every public name resolved as well
