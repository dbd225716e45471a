"""The pictures of metrics show the numbers of the metrics."""

import numpy as np
import pytest

from minift.metrics.calibration import reliability_curve
from minift.reports import plots
from minift.reports.plots import plot_confusion_matrix, plot_precision_recall, plot_reliability, plot_roc

pytest.importorskip("matplotlib")

Y, SCORE = [0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]


def test_the_matrix_has_counts_as_text_and_shares_as_colour():
    figure = plot_confusion_matrix(list("babcb"), list("bbbca"), labels=["c", "b", "a"])
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.texts] == ["1", "0", "0", "0", "2", "1", "0", "1", "0"]
    assert axes.images[0].get_array().tolist() == [[1, 0, 0], [0, 2 / 3, 1 / 3], [0, 1, 0]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["c", "b", "a"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("predicted", "true", "5 rows")


def test_many_labels_are_drawn_without_numbers():
    y = np.arange(40)
    assert not plot_confusion_matrix(y, y).axes[0].texts


def test_the_roc_curve_and_its_area():
    curve, guess = plot_roc(Y, SCORE).axes[0].lines
    assert curve.get_xydata().tolist() == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]
    assert curve.get_label() == "area 0.750" and guess.get_xydata().tolist() == [[0, 0], [1, 1]]
    named, _ = plot_roc(["no", "no", "yes", "yes"], SCORE, pos_label="yes").axes[0].lines
    assert named.get_xydata().tolist() == curve.get_xydata().tolist()


def test_precision_over_recall_is_drawn_in_steps():
    curve, guess = plot_precision_recall(Y, SCORE).axes[0].lines
    assert curve.get_xydata().tolist() == [[1, 0.5], [1, 2 / 3], [0.5, 0.5], [0.5, 1], [0, 1]]
    assert curve.get_drawstyle() == "steps-post" and curve.get_label() == "average 0.833"
    assert set(guess.get_ydata()) == {0.5}


@pytest.mark.parametrize(
    "y, prob, label",
    [
        ([0, 1, 1, 0], [0.05, 0.95, 0.92, 0.3], "share of positive rows"),
        ([0, 1, 2], [[0.5, 0.3, 0.2], [0.2, 0.7, 0.1], [0.6, 0.1, 0.3]], "share of rows that are right"),
    ],
)
def test_reliability_has_a_point_for_each_bin_with_rows(y, prob, label):
    upper, lower = plot_reliability(y, prob, bins=5).axes
    confidence, share, rows = reliability_curve(y, prob, 5)
    filled = np.asarray(rows) > 0
    assert upper.lines[1].get_xydata().tolist() == np.stack((confidence, share), 1)[filled].tolist()
    assert [bar.get_height() for bar in lower.patches] == list(rows)
    assert upper.get_ylabel() == label


def test_without_matplotlib_the_fix_is_named(monkeypatch):
    monkeypatch.setattr(plots, "_figure", lambda height: None)
    with pytest.raises(ModuleNotFoundError, match=r"plots need matplotlib: pip install .*\[plots\]"):
        plot_roc(Y, SCORE)
