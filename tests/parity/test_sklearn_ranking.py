"""Metrics of scores against scikit-learn's: values, warnings and refusals, in generated and awkward cases."""

import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")

from cases import CASES, cases
from hypothesis import given
from hypothesis import strategies as st
from sklearn import config_context
from sklearn import metrics as theirs

from minift import metrics

pytestmark = pytest.mark.parity

NAMES = [(0, 1), (-1, 1), (False, True), (1, 2), (0.0, 1.0), ("ham", "spam"), ("e\u0301", "\U0001f600")]
AVERAGES = ["micro", "macro", "weighted", "samples", None]
# Ties, both zeros, numbers that differ in the last bit or whose difference underflows, huge ones.
TIED = [0.0, -0.0, 0.5, 0.5 + 2**-53, 0.1 + 0.2, 0.3, 1.0, 5e-324, 1e-323, -1e300, 1e300, 2.0]
KINDS = [lambda c: c, lambda c: c * 2 - 3, lambda c: ["a", "aa", "b", "e\u0301", "\U0001f600"][c]]
WAYS = 4 * [("ovr", average) for average in ("micro", "macro", "weighted", None)]
WAYS += 6 * [("ovo", "macro"), ("ovo", "weighted")] + [("ovr", "samples"), ("ovo", "micro"), ("ovo", None)]
FAULTS = ["backwards", "too few", "twice", "unknown", "missing", "sum", "columns"]


def draw_bytes(draw, *shape) -> np.ndarray:
    size = int(np.prod(shape))
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8).reshape(shape).astype(int)


def draw_scores(draw, *shape) -> np.ndarray:
    return np.array(TIED)[draw_bytes(draw, *shape) % len(TIED)]


def outcome(call, *arguments, **settings):
    """(value or None where refused, whether it warned)."""
    peer = call.__module__.startswith("sklearn")
    refusals = (ValueError, NotImplementedError) if peer else (ValueError,)  # theirs for what it has not
    with warnings.catch_warnings(record=True) as seen, config_context(skip_parameter_validation=True):
        warnings.simplefilter("always")
        try:
            value = call(*arguments, **settings)
        except refusals:
            value = None
    kind = UserWarning if peer else metrics.MetricWarning
    return value, any(issubclass(w.category, kind) for w in seen)


def same(ours, reference) -> None:
    """The same outcome: to 1e-12, of scores from 0 to 1."""
    (value, warned), (expected, they_warned) = ours, reference
    assert (value is None) == (expected is None)
    if expected is None:
        return
    assert warned == they_warned
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (value, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)  # about 50 roundings of 2^-53, and room


def check(name: str, reference: str, *rows, **settings) -> None:
    ours = outcome(getattr(metrics, name), *rows, **settings)
    same(ours, outcome(getattr(theirs, reference), *rows, **settings))


@st.composite
def of_two(draw):
    names, n = draw(st.sampled_from(NAMES)), draw(st.integers(1, 24))
    return names, [names[byte % 2] for byte in draw_bytes(draw, n)], draw_scores(draw, n)


@CASES
@given(of_two(), st.sampled_from([np.float64, np.float32, np.int64]), st.booleans(), st.integers(1, 2))
def test_two_classes(case, dtype, drop, k):
    names, y, s = case
    s = np.clip(s, -1e18, 1e18).astype(dtype)
    check("roc_auc", "roc_auc_score", y, s, multi_class="ovo" if drop else "ovr", average="micro")
    check("average_precision", "average_precision_score", y, s, pos_label=names[1])
    for curve in ("roc_curve", "precision_recall_curve"):
        check(curve, curve, y, s, pos_label=names[1], drop_intermediate=drop)
    check("top_k_accuracy", "top_k_accuracy_score", y, s, k=k, labels=sorted(names))


@st.composite
def of_classes(draw):
    """Labels, rows of probabilities with many ties, and `labels`; one case in four has a fault."""
    k, kind = draw(st.integers(3, 4)), draw(st.sampled_from(KINDS))
    n = k + draw(st.integers(0, 12))
    y, labels = draw_bytes(draw, n) % k, range(k)
    parts = (draw_bytes(draw, n, k) % 5).astype(float)
    parts[:, 0] += parts.sum(axis=1) == 0
    s = parts / parts.sum(axis=1, keepdims=True)
    if draw(st.booleans()):
        y[:k] = range(k)
        labels = draw(st.sampled_from([None, labels]))
    fault = draw(st.sampled_from(21 * [None] + FAULTS))
    if fault == "unknown":
        y[0], labels = k - 1, [*range(k - 1), k]
    elif fault in ("backwards", "too few", "twice"):
        labels = {"backwards": range(k)[::-1], "too few": range(k - 1), "twice": [0, *range(k - 1)]}[fault]
    elif fault == "missing":
        y, labels = y % (k - 1), None
    elif fault == "sum":
        s[draw(st.integers(0, n - 1)), 0] += draw(st.sampled_from([0.5, 2e-5, 1e-6]))
    s = s[:, :2] if fault == "columns" else s
    return [kind(c) for c in y.tolist()], s, None if labels is None else [kind(c) for c in labels]


@cases(600)
@given(of_classes(), st.sampled_from(WAYS), st.sampled_from(AVERAGES), st.integers(1, 4))
def test_several_classes(case, way, average, k):
    y, s, labels = case
    chosen = {"multi_class": way[0], "average": way[1], "labels": labels}
    ours = outcome(metrics.roc_auc, y, s, **chosen)
    if len(set(y)) == 1 and s.shape[1] == 2:
        assert ours[0] is None  # they score one class as nan before they see that the scores are a matrix
    elif len(set(y)) == 1 and way[0] == "ovo" and ours[0] is not None:
        assert np.isnan(ours[0]) and ours[1]  # they average no pairs: nan unsaid, or ZeroDivisionError
    else:
        same(ours, outcome(theirs.roc_auc_score, y, s, **chosen))
    check("average_precision", "average_precision_score", y, s, average=average)
    check("top_k_accuracy", "top_k_accuracy_score", y, s, k=k, labels=labels)


@st.composite
def many_labels(draw):
    n, k = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    return draw_bytes(draw, n, k) % 2, draw_scores(draw, n, k)


@cases(500)
@given(many_labels(), st.sampled_from(AVERAGES))
def test_several_labels_a_row(case, average):
    check("roc_auc", "roc_auc_score", *case, average=average)
    check("average_precision", "average_precision_score", *case, average=average)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
@pytest.mark.parametrize("share", [0.5, 0.001])
def test_many_rows(dtype, share):
    rng = np.random.default_rng(0)
    y = (rng.random(100_000) < share).astype(int)
    s = (100 * (rng.normal(size=len(y)) + y)).astype(dtype)
    check("roc_auc", "roc_auc_score", y, s)
    check("average_precision", "average_precision_score", y, s)
    for curve in ("roc_curve", "precision_recall_curve"):
        for drop in (False, True):
            check(curve, curve, y, s, drop_intermediate=drop)
