"""Perplexity, and that the metrics need no torch."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minift.metrics import perplexity


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_uniform_guess_among_n_words_has_perplexity_n(n, tokens):
    """The exponent carries three roundings of a number of size ln n, and exp one more."""
    bound = (4 * math.log(n) + 2) * 2**-53
    assert perplexity(tokens * math.log(n), tokens) == pytest.approx(n, rel=bound)


def test_perplexity_weighs_tokens_and_not_texts():
    # 1 token at 3 nats and 9 at 1 nat: (3 + 9) / 10
    assert perplexity(3 + 9, 10) == math.exp(1.2)


def test_certainty_has_perplexity_one():
    assert perplexity(0.0, 5) == 1


@pytest.mark.parametrize("nats", [1e6, math.inf])
def test_perplexity_beyond_the_range_of_floats_is_infinite(nats):
    assert perplexity(nats, 1) == math.inf


def test_nats_that_are_not_a_number_stay_so():
    assert math.isnan(perplexity(math.nan, 3))


@pytest.mark.parametrize("tokens", [0, -1])
def test_perplexity_over_no_tokens_is_an_error(tokens):
    with pytest.raises(ValueError, match=f"over {tokens} tokens is undefined"):
        perplexity(1.0, tokens)


def test_metrics_need_no_torch(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('there is no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    program = "import minift.metrics; print(minift.metrics.rouge(['a b'], ['a b'])['rouge2'])\nimport torch"
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True)
    assert done.stdout == "(1.0, 1.0, 1.0)\n"
    assert "there is no torch here" in done.stderr
