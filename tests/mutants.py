"""Mutants: a module's source with one textual change, to see that a check notices."""

import linecache
import types
from itertools import count
from pathlib import Path

_number = count()


def mutate(module, old: str, new: str) -> types.ModuleType:
    """The module again, with the one occurrence of `old` replaced."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__file__}"
    source = source.replace(old, new)
    name = f"<mutant {next(_number)} of {module.__file__}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton reads it
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    exec(compile(source, name, "exec"), changed.__dict__)
    return changed


def survives(check, module, old: str, new: str) -> bool:
    """Whether a check that passes on the module also passes on the mutant."""
    mutant = mutate(module, old, new)
    try:
        check(mutant)
    except AssertionError:
        return False
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False  # a crash is noticed too
    return True
