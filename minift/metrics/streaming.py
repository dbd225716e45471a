"""Metrics over batches: the counts and sums that a metric needs, which add exactly.

    state = State(f1, average="macro")
    for batch in batches: state.update(y_true, y_pred)
    state.compute()

equals `f1` of all rows to the bit, in any split into batches and any order, and states of several processes
merge. It holds by construction: a metric is a function of statistics, and statistics are integers, exact
sums (exact.py) or the rows' scores, never means. STREAMS names for each metric the function that counts, and
a metric takes what that function counted in place of its rows: `f1(confusion(y_true, y_pred), None)`.
"""

import inspect

from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall, specificity
from minift.metrics.confusion import (
    accuracy,
    balanced_accuracy,
    confusion,
    confusion_matrix,
    matthews_corrcoef,
)

STREAMS = {  # metric -> the function that counts its statistics
    confusion_matrix: confusion,
    accuracy: confusion,
    balanced_accuracy: confusion,
    matthews_corrcoef: confusion,
    precision: confusion,
    recall: confusion,
    specificity: confusion,
    f1: confusion,
    fbeta: confusion,
    jaccard: confusion,
    hamming_loss: confusion,
}


class State:
    """A metric over batches: `update` takes its rows, `merge` another state, `compute` scores all."""

    def __init__(self, metric, **settings):
        from_name = getattr(metric, "__name__", metric)
        if metric not in STREAMS:
            known = ", ".join(m.__name__ for m in STREAMS)
            raise ValueError(f"{from_name} has no statistics that add; those that have: {known}")
        inspect.signature(metric).bind(None, None, **settings)
        self.metric, self.settings, self.statistics = metric, settings, None

    def update(self, *rows) -> "State":
        count = STREAMS[self.metric]
        takes = inspect.signature(count).parameters
        new = count(*rows, **{k: v for k, v in self.settings.items() if k in takes})
        self.statistics = new if self.statistics is None else self.statistics + new
        return self

    def merge(self, other: "State") -> "State":
        if (self.metric, self.settings) != (other.metric, other.settings):
            raise ValueError(
                f"a state of {self.metric.__name__} with {self.settings} does not merge with one of "
                f"{other.metric.__name__} with {other.settings}; give both the same metric and settings"
            )
        if other.statistics is not None:
            own = self.statistics
            self.statistics = other.statistics if own is None else own + other.statistics
        return self

    def compute(self):
        if self.statistics is None:
            raise ValueError(f"the state of {self.metric.__name__} has seen no rows; update it first")
        return self.metric(self.statistics, None, **self.settings)
