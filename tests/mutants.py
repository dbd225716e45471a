"""Mutants: a module's source with one textual change, to see that a check notices."""

import linecache
import types
from itertools import count
from pathlib import Path

_number = count()
_passed = set()


def mutate(module, old: str, new: str) -> types.ModuleType:
    """The module again, with the one occurrence of `old` replaced."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__file__}"
    return _run(module, source.replace(old, new))


def _run(module, source: str) -> types.ModuleType:
    name = f"<mutant {next(_number)} of {module.__file__}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton reads it
    changed = types.ModuleType(module.__name__)
    changed.__file__ = module.__file__
    exec(compile(source, name, "exec"), changed.__dict__)
    return changed


def survives(check, module, old: str, new: str) -> bool:
    """Whether a check that passes on the module also passes on the mutant."""
    mutant = mutate(module, old, new)
    _pass_on_a_copy(check, module)
    try:
        check(mutant)
    except AssertionError:
        return False
    except (RuntimeError, IndexError, TypeError, ValueError):
        return False  # a crash is noticed too
    return True


def _pass_on_a_copy(check, module) -> None:
    """A check that fails on every copy of a module would kill every mutant."""
    if module.__name__.startswith("minift.kernels"):
        return  # minutes in the interpreter; their files run the checks on the modules themselves
    code, closure = check.__code__, tuple(repr(cell.cell_contents) for cell in check.__closure__ or ())
    if (code, closure, module) in _passed:
        return
    try:
        check(_run(module, Path(module.__file__).read_text(encoding="utf-8")))
    except Exception as error:
        raise RuntimeError(f"{check} fails on an unchanged copy of {module.__file__}: {error}") from error
    _passed.add((code, closure, module))
