"""Which modules a rule means.

A rule is a name (`q_proj`, `self_attn.q_proj`, or a whole path: the path ends with it, at a dot), a glob over
the whole path (`model.layers.1?.mlp.*`), or `all-linear`: every linear layer but the head and all that is
new in it.
"""

import difflib
from fnmatch import fnmatchcase
from functools import cache

from minift.models.interface import LanguageModel
from minift.models.wrappers import base_layers, path_of

ALL_LINEAR = "all-linear"


def as_rules(value) -> tuple[str, ...]:
    """One rule or a list of them, as a config may give them."""
    return tuple(map(str, (value,) if isinstance(value, str | int) else value))


def fits(path: str, rule: str) -> bool:
    if any(c in rule for c in "*?["):
        return fnmatchcase(path, rule)
    return path == rule or path.endswith("." + rule)


def match(
    model: LanguageModel,
    target_modules,
    exclude_modules=(),
    layers=(),
    fields=("target_modules", "exclude_modules"),
    among=None,
    what="linear layer",
) -> dict[str, str]:
    """Path -> the first rule that means it, in the model's order. A rule that matches nothing is an error.

    `among` are the paths that rules may mean, by default those of the linear layers, and `what` is their
    kind, in words. `layers` holds block numbers and ranges, as 3 or "8-15"; empty means all, and layers
    outside the blocks. `fields` is what errors call the two lists of rules.
    """
    linear = base_layers(model)
    paths = list(linear if among is None else among)
    if not target_modules:
        raise ValueError(f"{fields[0]} is empty; name some of {sorted(_names(paths))} or {ALL_LINEAR!r}")

    @cache
    def hits(rule):
        if rule == ALL_LINEAR:
            head = path_of(model, model.head)
            return [p for p in paths if p in linear and p != head and not model.is_new(p)]
        return [p for p in paths if fits(p, rule)]

    for field, rules in zip(fields, (target_modules, exclude_modules), strict=True):
        for rule in rules:
            if not hits(rule):
                raise ValueError(f"{field} {[rule]} match no {what}; nearest: {nearest(rule, paths)}")
    excluded = {path for rule in exclude_modules for path in hits(rule)}
    wanted = parse_layers(layers, len(model.blocks))
    found = {}
    for path in paths:
        rule = next((rule for rule in target_modules if path in hits(rule)), None)
        if rule and path not in excluded and (wanted is None or model.block_index(path) in wanted):
            found[path] = rule
    for rule in target_modules:
        if not any(path in found for path in hits(rule)):
            left_out = [f"{fields[1]} {list(exclude_modules)}"] if exclude_modules else []
            left_out += [f"layers_to_transform {list(layers)}"] if layers else []
            raise ValueError(f"{fields[0]} {[rule]} match only layers that {' or '.join(left_out)} leave out")
    return found


def parse_layers(layers, blocks: int) -> set[int] | None:
    """{numbers} from 3, "3" and "8-15" (both ends included), or None for no restriction."""
    if not layers:
        return None
    wanted = set()
    for item in layers:
        first, dash, last = str(item).partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(
                f"layers_to_transform {item!r} is neither a block number nor a range such as '8-15'"
            )
        first, last = int(first), int(last) if dash else int(first)
        if first > last or last >= blocks:
            raise ValueError(f"layers_to_transform {item!r} is outside the blocks 0-{blocks - 1}")
        wanted |= set(range(first, last + 1))
    return wanted


def nearest(rule: str, paths) -> list[str]:
    """Names that look like a rule that matched nothing; all of them where none does."""
    pool = sorted(_names(paths)) if "." not in rule else list(paths)
    close = difflib.get_close_matches(rule, pool, n=3, cutoff=0.3)
    return close or sorted(_names(paths))


def _names(paths) -> set[str]:
    return {path.rpartition(".")[2] for path in paths}
