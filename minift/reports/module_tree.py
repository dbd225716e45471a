"""minift inspect: the module tree of a model, what it holds, and what the usual rules of methods mean in it.

parameters: elements, a tied weight at its first place, a quantized one as the matrix that it stands for
bytes: of what is stored, codes and scales included
"""

import json
from dataclasses import asdict, dataclass
from math import prod

from minift.methods.plan import aligned
from minift.models.interface import LanguageModel, is_quantized
from minift.models.targets import ALL_LINEAR, match
from minift.models.wrappers import bare_modules, innermost


@dataclass(frozen=True)
class Node:
    """A module, or several that are alike in everything but their number."""

    name: str
    path: str  # of the first
    depth: int
    copies: int  # how many such modules the model has, those of alike parents among them
    kind: str
    shape: tuple[int, ...]  # of its weight, (out, in), or of its first parameter
    dtype: str
    parameters: int  # of all copies together, with what lies below
    nbytes: int
    rules: tuple[str, ...]  # that mean it: all-linear, the family's usual targets, roles

    def row(self) -> tuple[str, ...]:
        times = f" x {self.copies}" if self.copies > 1 else ""
        shape = " x ".join(map(str, self.shape)) or "-"
        name = f"{'  ' * self.depth}{self.name}"
        numbers = (f"{self.parameters:,}", f"{self.nbytes:,}")
        return (name, self.kind + times, shape, self.dtype or "-", *numbers, ", ".join(self.rules))


def module_tree(model: LanguageModel) -> list[Node]:
    """The tree in the model's order, parents before children; a weight that is shared counts once."""
    rules, sizes = _rules(model), _sizes(model)
    nodes = []

    def visit(children, prefix, depth, above):
        for name, members in _alike(children):
            paths = [f"{prefix}{number}" for number, _ in members]
            module, path = members[0][1], paths[0]
            layer = innermost(module)
            below = [sizes[p] for own in paths for p in sizes if p == own or p.startswith(own + ".")]
            if not below:
                continue  # an activation, a rotary table: holds nothing
            parameters, nbytes = (above * sum(column) for column in zip(*below, strict=True))
            shape, dtype = _shape(layer), _dtype(layer)
            copies = above * len(members)
            kind = type(layer).__name__
            marks = tuple(rules.get(path, ()))
            nodes.append(Node(name, path, depth, copies, kind, shape, dtype, parameters, nbytes, marks))
            visit(layer.named_children(), f"{path}.", depth + 1, copies)

    visit(((n, m) for n, m in model.named_children() if m is not model.slots), "", 0, 1)
    return nodes


def describe(model: LanguageModel, as_json: bool = False) -> str:
    nodes = module_tree(model)
    totals = [sum(getattr(n, field) for n in nodes if n.depth == 0) for field in ("parameters", "nbytes")]
    if as_json:
        rows = [asdict(node) for node in nodes]
        return json.dumps(
            {"model": model.source, "parameters": totals[0], "bytes": totals[1], "modules": rows}
        )
    table = [("module", "kind", "shape", "dtype", "parameters", "bytes", "rules")]
    table += [node.row() for node in nodes]
    head = f"{model.architecture}, head {model.head_kind}" + (
        f", {len(model.labels)} labels" * bool(model.labels)
    )
    tied = "; embedding and head are one weight" if model.tied else ""
    new = f"; new: {', '.join(model.new_modules)}" if model.new_modules else ""
    return (
        f"{head}{tied}{new}\n{aligned(table, right=(4, 5))}\n"
        f"parameters: {totals[0]:,} || bytes: {totals[1]:,} ({totals[1] / 2**20:,.1f} MiB)"
    )


def _rules(model: LanguageModel) -> dict[str, list[str]]:
    """Path -> the rules that mean it, in words."""
    modules = bare_modules(model)
    found = {}
    for rule in (ALL_LINEAR, *model.usual_targets):
        for path in match(model, [rule]):
            found.setdefault(path, []).append(rule)
    for role, rules in model.sites.items():
        for path in match(model, rules, among=modules, what="module") if rules else ():
            found.setdefault(path, []).append(f"role {role}")
    for path in modules:
        if model.is_new(path):
            found.setdefault(path, []).append("new head")
    return found


def _sizes(model: LanguageModel) -> dict[str, tuple[int, int]]:
    """Path -> (parameters, bytes) of a module's own tensors."""
    seen, found = set(), {}
    for path, module in bare_modules(model).items():
        layer, numbers, nbytes = innermost(module), 0, 0
        for p in layer._parameters.values():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            numbers += p.numel() if p.is_floating_point() else 0
            nbytes += p.numel() * p.element_size()
        if is_quantized(layer):
            numbers += layer.in_features * layer.out_features
        if nbytes or numbers:
            found[path] = (numbers, nbytes)
    return found


def _alike(children) -> list[tuple[str, list]]:
    """(name, its modules) where neighbours that have numbers for names and the same structure are one."""
    groups = []
    for name, module in children:
        sign = _signature(module) if name.isdigit() else None
        if groups and sign is not None and groups[-1][0] == sign:
            groups[-1][1].append((name, module))
        else:
            groups.append((sign, [(name, module)]))
    named = []
    for _, members in groups:
        first, last = members[0][0], members[-1][0]
        named.append((first if len(members) == 1 else f"{{{first}-{last}}}", members))
    return named


def _signature(module) -> tuple:
    layer = innermost(module)
    own = tuple((n, tuple(p.shape), p.dtype) for n, p in layer._parameters.items() if p is not None)
    return (type(layer), own, tuple((n, _signature(m)) for n, m in layer.named_children()))


def _shape(layer) -> tuple[int, ...]:
    if is_quantized(layer):
        return (layer.out_features, layer.in_features)
    shapes = [tuple(p.shape) for p in layer._parameters.values() if p is not None]
    return max(shapes, key=prod, default=())


def _dtype(layer) -> str:
    if is_quantized(layer):
        return layer.layout.format.name
    found = [str(p.dtype).removeprefix("torch.") for p in layer._parameters.values() if p is not None]
    return found[0] if found else ""
