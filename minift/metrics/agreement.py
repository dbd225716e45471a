"""Whether raters agree more than chance would make them: kappa for two or for many, and alpha.

    agreement = 1 - observed disagreement / disagreement expected of ratings dealt out at random

All are 1 where raters always agree and 0 where they agree as often as chance. They differ in what chance
deals out (each rater's own labels, or those of all raters together) and in which raters they can take.
"""

from collections import Counter
from itertools import accumulate

import numpy as np

from minift.metrics.checks import choice, warn
from minift.metrics.confusion import one_label, places
from minift.metrics.totals import Totals

NAN = float("nan")
CELLS = 1 << 22  # of a matrix of distances at a time


def cohen_kappa(y1, y2, labels=None, weights=None, replace_undefined_by: float = NAN) -> float:
    """Agreement of two raters beyond what their own shares of labels would give by chance.

    kappa = 1 - n sum w_ij C_ij / sum w_ij r_i c_j     C the confusion matrix, r and c its sums over j and i
    w_ij = 1 for i != j, or |i - j| for weights "linear", or (i - j)^2 for "quadratic"

    i and j are places among `labels`: by default those that occur, sorted; rows with another label are left
    out. Where nothing can disagree, as when both raters use the same one label, the score is
    `replace_undefined_by`, with a warning.
    Range: -1 to 1, 1 is full agreement, 0 what chance gives.
    Use: two annotators of the same rows, or a judge model against a person; weights where labels have an
    order.
    Lies: with one label in 95 % of the rows, 94 % agreement can score below 0.5; and "quadratic" grows with
    the number of labels. Raters who are wrong together agree.
    Source: Cohen 1960, "A coefficient of agreement for nominal scales"; Cohen 1968 for weights;
    scikit-learn's cohen_kappa_score.

    >>> cohen_kappa(["yes", "yes", "no", "no"], ["yes", "no", "no", "no"])
    0.5
    """
    choice(weights, (None, "linear", "quadratic"), "weights")
    if not -1 <= replace_undefined_by <= 1 and replace_undefined_by == replace_undefined_by:
        raise ValueError(f"replace_undefined_by {replace_undefined_by!r} is not within -1 to 1, nor nan")
    c = one_label(y1, y2)
    place, size = places(c, labels)
    first, second = place[c.true], place[c.predicted]
    if not (first >= 0).any():
        raise ValueError(f"none of labels {np.asarray(labels).tolist()} is in y1; give at least one that is")
    known = (first >= 0) & (second >= 0)
    cells = list(zip(first[known].tolist(), second[known].tolist(), c.count[known].tolist(), strict=True))
    rows, columns, observed = [0] * size, [0] * size, 0
    for i, j, count in cells:
        rows[i] += count
        columns[j] += count
        observed += _weight(i, j, weights) * count
    expected = _expected(rows, columns, weights)
    if not expected:
        warn(f"the raters have one label in common, or none, and kappa is taken as {replace_undefined_by}")
        return float(replace_undefined_by)
    return (expected - sum(rows) * observed) / expected


def _weight(i: int, j: int, weights) -> int:
    return {None: int(i != j), "linear": abs(i - j), "quadratic": (i - j) ** 2}[weights]


def _expected(r: list[int], c: list[int], weights) -> int:
    """sum over i, j of w_ij r_i c_j, in one pass over the labels."""
    n, at = sum(r), range(len(r))
    if weights is None:
        return n * n - sum(r[i] * c[i] for i in at)
    if weights == "linear":  # |i - j| counts the steps t with one of the two up to t and the other beyond it
        steps = zip(accumulate(r), accumulate(c), strict=True)
        return sum(up * (n - to) + to * (n - up) for up, to in steps)
    mean_r, mean_c = (sum(i * x[i] for i in at) for x in (r, c))
    return n * sum(i * i * (r[i] + c[i]) for i in at) - 2 * mean_r * mean_c


def fleiss_kappa(table) -> float:
    """Agreement of many raters beyond chance, from counts of how many put each subject in each category.

    kappa = (P - Pe) / (1 - Pe)
    P = mean over subjects of sum_j n_ij (n_ij - 1) / (r (r - 1)),   Pe = sum_j (share of all ratings in j)^2

    `table` (subjects, categories) holds n_ij, and each of its rows sums to the same r >= 2; raters may be
    other people for each subject. Where all ratings are in one category it is nan, with a warning.
    Range: -1 / (r - 1) to 1, 1 is full agreement, 0 what chance gives.
    Use: a fixed number of raters for each subject, categories without order.
    Lies: a rare category makes it low though raters hardly ever differ; a miss by one step counts as one by
    four: then `krippendorff_alpha` with level "ordinal".
    Source: Fleiss 1971, "Measuring nominal scale agreement among many raters"; statsmodels' fleiss_kappa.

    >>> fleiss_kappa([[3, 0], [0, 3], [2, 1], [3, 0]])
    0.625
    """
    subjects, ratings, squares, same, categories = table_counts(table)
    if subjects * squares != ratings * ratings:
        raise ValueError("the batches have different numbers of raters for a subject; give each the same")
    raters = ratings // subjects
    both = (same - ratings) * ratings  # P and Pe times ratings^2 (r - 1), integers
    chance = sum(total * total for total in categories.tolist()) * (raters - 1)
    rest = ratings * ratings * (raters - 1) - chance
    if not rest:
        warn("all ratings are in one category, so kappa is undefined: nan")
        return NAN
    return (both - chance) / rest


def table_counts(table) -> Totals:
    """Subjects; the sums of ratings, of squared row sums and of squared counts; ratings of each category."""
    if isinstance(table, Totals):
        return table
    array = np.asarray(table)
    if array.ndim != 2 or not len(array) or array.shape[1] < 2 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"table has shape {array.shape} and holds {array.dtype}; give counts, (subjects, categories), "
            "with at least one subject and two categories"
        )
    wrong = ~((array >= 0) & (array == np.floor(array)) & (array < 1 << 20))
    if wrong.any():
        at = tuple(map(int, np.argwhere(wrong)[0]))
        raise ValueError(f"table{list(at)} is {array[at]}; give counts, whole numbers of at least 0")
    array = array.astype(np.int64)
    sums = array.sum(axis=1)
    if (other := sums != sums[0]).any() or sums[0] < 2:
        row = int(np.argmax(other))
        raise ValueError(
            f"row {row} of table sums to {sums[row]} and row 0 to {sums[0]}; give each subject the same "
            "number of ratings, at least 2"
        )
    same = int((array * array).sum())
    return Totals(len(array), int(sums.sum()), int((sums * sums).sum()), same, array.sum(axis=0))


def krippendorff_alpha(ratings, level: str = "nominal") -> float:
    """Agreement of any number of raters beyond chance, who may each have left units out.

    alpha = 1 - (n - 1) sum o_ck d_ck / sum n_c n_k d_ck
    o_ck = sum over units u of pairs of ratings (c, k) in u / (m_u - 1),   n_c = sum over k of o_ck
    d_ck = [c != k] "nominal", (c - k)^2 "interval", ((c - k) / (c + k))^2 "ratio",
           or of "ordinal" the squared number of ratings from the middle of c's to the middle of k's

    `ratings` is (coders, units), with None or nan where a coder did not rate; a unit with m_u < 2 ratings
    does not count. No unit with two is an error; where all ratings that count are equal it is nan, with a
    warning. Strings can only be nominal; ratios take numbers of at least 0.
    Range: about -1 to 1, 1 is full agreement, 0 what chance gives.
    Use: missing ratings, raters of unequal diligence, scales; 0.8 is customary for firm conclusions.
    Lies: the level is a choice, and the highest of four alphas is not a finding; few units make it jump.
    Source: Krippendorff 2011, "Computing Krippendorff's alpha-reliability"; Hayes and Krippendorff 2007.

    >>> round(krippendorff_alpha([[1, 2, 3, None], [1, 2, 3, 3], [None, 3, 3, 3]], "ordinal"), 4)
    0.775
    """
    choice(level, ("nominal", "ordinal", "interval", "ratio"), "level")
    (pairs,) = coincidences(ratings)
    if not pairs:
        raise ValueError("no unit has two ratings; give at least one unit that two coders rated")
    values = sorted({v for _, *pair in pairs for v in pair})
    if level != "nominal" and isinstance(values[-1], str):
        raise ValueError(f"level {level!r} needs numbers, and the ratings are strings, as {values[0]!r}")
    if level == "ratio" and values[0] < 0:
        raise ValueError(f"level 'ratio' needs ratings of at least 0, and one is {values[0]}")
    if len(values) == 1:
        warn("all ratings that count are equal, so alpha is undefined: nan")
        return NAN
    place = {v: i for i, v in enumerate(values)}
    cells = sorted((m, place[c], place[k], count) for (m, c, k), count in pairs.items())
    m, c, k, count = np.array(cells).T
    o = count / (m - 1)  # each pair stands for (c, k) and (k, c)
    n_c = np.rint(np.bincount(c, o, len(values)) + np.bincount(k, o, len(values)))  # whole by definition
    n = n_c.sum()
    if level == "nominal":
        observed, expected = o[c != k].sum(), n * n - (n_c * n_c).sum()
    elif level == "ratio":
        x = np.array(values, np.float64)
        x = x / x.max()
        observed, expected = (o * _ratio(x[c], x[k])).sum(), _expected_ratio(x, n_c)
    else:
        x = np.cumsum(n_c) - n_c / 2 if level == "ordinal" else np.array(values, np.float64)
        x = x - (n_c * x).sum() / n
        x = x / np.abs(x).max()
        observed = (o * (x[c] - x[k]) ** 2).sum()
        expected = 2 * (n * (n_c * x * x).sum() - (n_c * x).sum() ** 2)
    return float(1 - (n - 1) * 2 * observed / expected)


def _ratio(c: np.ndarray, k: np.ndarray) -> np.ndarray:
    both = c + k
    return (np.abs(c - k) / np.where(both > 0, both, 1)) ** 2


def _expected_ratio(x: np.ndarray, n_c: np.ndarray) -> float:
    """sum n_c n_k d_ck, which for ratios no shorter sum gives."""
    lines = max(1, CELLS // len(x))
    starts = range(0, len(x), lines)
    return sum(
        float((n_c[s : s + lines, None] * n_c * _ratio(x[s : s + lines, None], x)).sum()) for s in starts
    )


def coincidences(ratings) -> Totals:
    """(ratings in the unit, one of them, another, not smaller) -> pairs of ratings."""
    if isinstance(ratings, Totals):
        return ratings
    units, values = _known(ratings)
    order = np.argsort(units, kind="stable")
    kinds, place = np.unique(values, return_inverse=True)
    units, place, kinds = units[order], place[order], kinds.tolist()
    m = np.bincount(units)[units]  # ratings in the rating's unit
    pairs = Counter()
    for apart in range(1, int(m.max(initial=1))):
        same = units[apart:] == units[:-apart]
        a, b = place[apart:][same], place[:-apart][same]
        cell = (m[apart:][same] * len(kinds) + np.minimum(a, b)) * len(kinds) + np.maximum(a, b)
        for at, count in zip(*(x.tolist() for x in np.unique(cell, return_counts=True)), strict=True):
            rest, high = divmod(at, len(kinds))
            pairs[rest // len(kinds), kinds[rest % len(kinds)], kinds[high]] += count
    return Totals(pairs)


def _known(ratings) -> tuple[np.ndarray, np.ndarray]:
    """The unit and the value of each rating that is there."""
    array = ratings if isinstance(ratings, np.ndarray) else np.array(ratings, dtype=object)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"ratings has shape {array.shape}; give (coders, units) with at least one of each")
    if array.dtype.kind == "U" and np.isin(array, ("nan", "None")).any():
        raise ValueError("numpy made strings of missing ratings; give lists, or an array of dtype object")
    if array.dtype.kind in "biuf":
        there = array == array  # False where nan
        wrong = np.flatnonzero(np.isinf(array[there]))[:1]
    else:
        array = array.astype(object)
        there = np.array([[v is not None and v == v for v in row] for row in array])
        wrong = range(there.sum())
    values = array[there]
    for i in wrong:
        v = values[i]
        number = isinstance(v, (int, float, np.integer, np.floating)) and abs(v) != float("inf")
        if not (number or isinstance(v, str)) or isinstance(v, str) != isinstance(values[0], str):
            at = list(map(int, np.argwhere(there)[i]))
            raise ValueError(
                f"ratings{at} is {v!r} and the first is {values[0]!r}; give finite numbers, or strings, and "
                "None where a rating is missing"
            )
    return np.nonzero(there)[1], values
