"""What `minift metrics list` and `minift metrics explain` print: the docstrings of the metrics."""

import difflib
import inspect

from minift.metrics import FAMILIES

METRICS = {metric.__name__: metric for metrics in FAMILIES.values() for metric in metrics}


def listing() -> str:
    """A line for each metric: its name and what it computes."""
    width = max(map(len, METRICS))
    lines = []
    for family, metrics in FAMILIES.items():
        lines += ["", family] if lines else [family]
        lines += [f"  {m.__name__:{width}}  {inspect.getdoc(m).splitlines()[0]}" for m in metrics]
    return "\n".join(lines)


def explain(name: str) -> str:
    """The metric's signature and docstring, and that of its file, where what its family shares is said."""
    if name not in METRICS:
        near = [known for known in METRICS if name.lower() in known]
        near = near or difflib.get_close_matches(name.lower(), METRICS, n=3, cutoff=0.4)
        raise ValueError(f"unknown metric {name!r}; nearest: {near}; `minift metrics list` prints all")
    metric = METRICS[name]
    around = inspect.getdoc(inspect.getmodule(metric))
    return f"{name}{inspect.signature(metric)}\n\n{inspect.getdoc(metric)}\n\nIts file:\n\n{around}"
