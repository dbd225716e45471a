"""Cross entropy, perplexity and bits per byte, and that the metrics need no torch."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mutants import survives

from minift.metrics import State, bits_per_byte, bits_per_character, cross_entropy, language_model, perplexity
from minift.metrics.language_model import nll

ALL = [cross_entropy, perplexity, bits_per_byte, bits_per_character]
batches = st.lists(st.tuples(st.floats(0, 1e4), st.integers(1, 500)), min_size=1, max_size=10)


def check_by_hand(module):
    # 1 token at 3 nats and 9 at 1 nat: (3 + 9) / 10
    assert module.perplexity(3 + 9, 10) == module.perplexity([3, 9], [1, 9]) == math.exp(1.2)
    assert module.cross_entropy([3, 9], [1, 9]) == 1.2
    assert module.perplexity(30, 10, base="bits") == 8
    # A byte or letter among 256 is 8 bits, whatever the tokens: here 20 bytes and 10 letters.
    assert module.bits_per_byte(20 * math.log(256), 20) == pytest.approx(8, rel=2**-50)
    assert module.bits_per_character(20 * math.log(256), 10) == pytest.approx(16, rel=2**-50)
    # Batches that would be lost one by one in doubles, and one without tokens.
    assert module.cross_entropy([2.0**60, *16 * [2.0**-40], 0.0], [1, *16 * [1], 0]) * 17 == 2.0**60
    assert (
        module.cross_entropy([2.0**-60, 1.0, 0.0], [1, 1, 0]) == 0.5
        and module.nll([2.0**-60, 1], [1, 1])[0] > 1
    )
    assert module.cross_entropy([math.inf, 1.0], [1, 3]) == module.perplexity(2000.0, 2) == math.inf
    assert math.isnan(module.cross_entropy([1.0, math.nan, math.inf], [1, 1, 1]))
    assert module.perplexity(-1e-6, 1) < 1  # rounding
    for sums, counts, words in (
        ([1.0, -30.0], [1, 20], "is a log-likelihood"),
        ([1.0, 3.0], [1, 0], "is of no tokens"),
        ([1.0, 3.0], [2, -1], "count is"),
    ):
        try:
            said = str(module.perplexity(sums, counts))
        except ValueError as error:
            said = str(error)
        assert words in said


def test_values_by_hand():
    check_by_hand(language_model)


MUTANTS = [
    ("math.exp(mean) if base", "math.exp2(mean) if base"),
    ("2.0**mean", "math.exp(mean)"),
    ("int(counts.sum())", "len(counts)"),
    ("int(counts.sum())", "int(counts.max())"),
    ("exact.total(totals[finite])", "exact.total(totals[finite].mean())"),
    ("float(totals[~finite].sum())", "0.0"),
    ("exact.mean(units, count) + infinite", "exact.mean(units, count)"),
    ('_mean(nll(nats, bytes), "bytes") / math.log(2)', '_mean(nll(nats, bytes), "bytes") * math.log(2)'),
    ('"characters") / math.log(2)', '"characters")'),
    ("        return math.inf", "        return math.nan"),
    ("NEGATIVE = -0.01", "NEGATIVE = -2"),
    ("NEGATIVE = -0.01", "NEGATIVE = 0"),
    ("(counts == 0) & (totals > 0)", "(counts == 0) & (totals < 0)"),
    ("(counts < 0).any()", "(counts < 0).all()"),
]


@pytest.mark.parametrize("old, new", MUTANTS)
def test_mutants_die(old, new):
    assert not survives(check_by_hand, language_model, old, new)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_uniform_guess_among_n_words_has_perplexity_n(n, tokens):
    """The exponent carries three roundings of a number of size ln n, and exp one more."""
    bound = (4 * math.log(n) + 2) * 2**-53
    assert perplexity(tokens * math.log(n), tokens) == pytest.approx(n, rel=bound)
    assert perplexity(tokens * math.log2(n), tokens, base="bits") == pytest.approx(n, rel=bound)


@given(batches, st.permutations(range(10)))
def test_batches_weigh_what_they_have_tokens_in_any_order(rows, order):
    nats, counts = map(list, zip(*rows, strict=True))
    mean = math.fsum(nats) / sum(counts)  # the sum rounded, then the quotient
    assert cross_entropy(nats, counts) == pytest.approx(mean, rel=2**-51)
    for metric in ALL:
        state = State(metric)
        for i in order:
            if i < len(rows):
                state.update(*rows[i])
        assert state.compute() == metric(nats, counts) == metric(nll(nats, counts), None)


def test_the_mean_of_batches_means_is_another_number():
    assert (cross_entropy(3.0, 1) + cross_entropy(9.0, 9)) / 2 == 2 != cross_entropy([3.0, 9.0], [1, 9])


def test_padding_that_is_counted_lowers_the_score():
    assert perplexity([8.0, 8.0], [4, 8]) < perplexity([8.0, 8.0], [4, 4])


def test_certainty_has_perplexity_one():
    assert perplexity(0.0, 5) == 1 and bits_per_byte(0.0, 5) == 0


@pytest.mark.parametrize("nats", [1e6, math.inf])
def test_perplexity_beyond_the_range_of_floats_is_infinite(nats):
    assert perplexity(nats, 1) == perplexity(nats, 1, base="bits") == math.inf


def test_nats_that_are_not_a_number_stay_so():
    assert math.isnan(perplexity(math.nan, 3))


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: perplexity(0.0, 0), "a mean over 0 tokens is undefined; count at least one"),
        (lambda: bits_per_byte([], []), "a mean over 0 bytes is undefined"),
        (lambda: perplexity(1.0, -1), "count is -1; give integers of at least 0"),
        (lambda: perplexity(1.0, 2.5), "count is 2.5"),
        (lambda: perplexity(1.0, None), "count is None"),
        (lambda: perplexity("1", 1), "total is '1'; give one sum, or a list"),
        (lambda: perplexity([[1.0]], [[1]]), "give one sum, or a list"),
        (lambda: perplexity([1.0, 2.0], [1]), "the list of totals has 2 rows and that of counts 1"),
        (lambda: perplexity([1.0, 2.0], 3), "the list of totals has 2 rows and that of counts 1"),
        (
            lambda: perplexity(-math.inf, 3),
            "a total of -inf over 3 is a log-likelihood; give the negative one",
        ),
        (lambda: perplexity(1.0, 3, base="dits"), "base 'dits' is not one of 'nats', 'bits'"),
    ],
)
def test_what_is_no_sum_and_count_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_metrics_need_no_torch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import minift.metrics; print(minift.metrics.rouge(['a b'], ['a b'])['rouge2'])\nimport torch"
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert done.stdout == "(1.0, 1.0, 1.0)\n"
    assert "there is no torch here" in done.stderr
