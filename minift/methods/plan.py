"""What a method will train, layer by layer: Site and Plan, and their table."""

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Site:
    """One row of a plan: what is adapted, by which rule, and what that adds."""

    path: str  # module path, without wrappers; of a weight that is trained itself, the parameter's name
    rule: str
    shape: tuple[int, ...]  # of the adapted weight, (out, in), or of what is trained
    parameters: int  # trainable, by the method's formula for this site
    formula: str = ""  # that formula with its numbers, as "8 (4096 + 4096)"
    dtype: str = "float32"  # of the trainable parameters
    r: int | None = None
    scaling: float | None = None
    replaces: bool = False  # stands in the place of base parameters instead of beside them
    tied_to: str = ""  # the path of the site that it shares its weight with, which counts the parameters


@dataclass(frozen=True)
class Plan:
    """What a method will train. Printing it gives the table and the line of totals."""

    method: object  # a Method
    sites: tuple[Site, ...]
    base_parameters: int  # of the model before the method, a tied weight counted once
    head: tuple[Site, ...] = ()  # what the checkpoint did not have: it trains whatever the method is

    @property
    def trainable(self) -> int:
        return self.method.count(self) + sum(prod(site.shape) for site in self.head)

    @property
    def added(self) -> int:
        """Parameters that come on top of the base's."""
        return sum(site.parameters for site in self.sites if not site.replaces)

    @property
    def total(self) -> int:
        return self.base_parameters + self.added

    def totals(self) -> str:
        share = 100 * self.trainable / self.total
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {share:.4f}"
        )

    def table(self, every_layer: bool = True, bases: dict[str, str] | None = None) -> str:
        """A row for each site, or one for those that differ in the block alone.

        `bases`: path -> what the base layer there is stored as, for one more column.
        """
        rows = [("module", "rule", "r", "alpha", "scaling", "dtype", "base", "parameters")]
        everything = (*self.sites, *self.head)
        scale = getattr(self.method, "scale", None)  # (r, alpha), proportional to alpha
        for path, sites in _each(everything) if every_layer else _grouped(everything):
            s = sites[0]
            known = scale and s.r and s.scaling is not None
            rows.append(
                (
                    path,
                    s.rule,
                    "-" if s.r is None else str(s.r),
                    f"{s.scaling / scale(s.r, 1.0):g}" if known else "-",
                    "-" if s.scaling is None else f"{s.scaling:g}",
                    s.dtype,
                    (bases or {}).get(s.path, "-"),
                    f"{sum(x.parameters for x in sites):,}",
                )
            )
        if bases is None:
            rows = [(*row[:6], row[7]) for row in rows]
        return aligned(rows, right=(2, 3, 4, len(rows[0]) - 1))

    def __str__(self):
        return f"{self.table(every_layer=False)}\n{self.totals()}"


def aligned(rows: list[tuple[str, ...]], right: tuple[int, ...]) -> str:
    """Rows of texts as a table; the columns `right` end at the same place."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _each(sites):
    return [(s.path, [s]) for s in sites]


def _grouped(sites):
    """Sites that differ in one number of their path and nothing else, under that path with {first-last}."""
    groups = {}
    for s in sites:
        parts = s.path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        number = None if at is None else int(parts[at])
        shape = (*parts[:at], "", *parts[at + 1 :]) if at is not None else tuple(parts)
        groups.setdefault((shape, at, s.rule, s.shape, s.r, s.scaling, s.dtype), []).append((number, s))
    named = []
    for (shape, at, *_), members in groups.items():
        numbers = [number for number, _ in members]
        if at is None:
            path = ".".join(shape)
        elif numbers == list(range(numbers[0], numbers[-1] + 1)):
            span = str(numbers[0]) if len(numbers) == 1 else f"{{{numbers[0]}-{numbers[-1]}}}"
            path = ".".join((*shape[:at], span, *shape[at + 1 :]))
        else:
            path = ".".join((*shape[:at], "{" + ",".join(map(str, numbers)) + "}", *shape[at + 1 :]))
        named.append((path, [s for _, s in members]))
    return named
