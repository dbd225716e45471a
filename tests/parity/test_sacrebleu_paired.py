"""The paired bootstrap beside sacrebleu's, on the same draws.

Known difference: sacrebleu counts |d_b| - mean |d_b| > |d|, so that a system beside itself gets the smallest
p there is, 1 / (1 + samples); here >= counts, as in Riezler and Maxwell 2005, and it gets 1.
"""

import pytest

pytest.importorskip("sacrebleu")

import numpy as np
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from minift.metrics.resampling import paired_bootstrap

pytestmark = pytest.mark.parity
WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "was", "here"]


def spoiled(sentence: str, rng, share: float) -> str:
    return " ".join(rng.choice(WORDS) if rng.random() < share else word for word in sentence.split())


def bleu(hypotheses, references) -> float:
    return BLEU(force=True).corpus_score(list(hypotheses), [list(references)]).score


@pytest.mark.parametrize("case", range(6))
def test_p_is_sacrebleus(case, monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "12345")
    rng = np.random.default_rng(case)
    references = [" ".join(rng.choice(WORDS, rng.integers(6, 15))) for _ in range(25)]
    base = [spoiled(r, rng, 0.3) for r in references]
    other = [spoiled(r, rng, 0.3 - case * 0.04) for r in references]
    test = PairedTest(
        [("base", base), ("other", other)],
        {"BLEU": BLEU(force=True, references=[references])},
        None,
        "bs",
        100,
    )
    _, scores = test()
    theirs = scores["BLEU"][1]
    ours = paired_bootstrap((other, references), (base, references), bleu, samples=100, seed=12345)
    assert ours["p"] == theirs.p_value
    assert ours["difference"] == pytest.approx(theirs.score - scores["BLEU"][0].score, rel=0, abs=1e-9)


def test_a_system_beside_itself_is_no_finding_here():
    references = ["the cat sat on the mat", "a dog ran under the tree", "it was here and then there"]
    same = ([r.replace("the", "a") for r in references], references)
    assert paired_bootstrap(same, same, bleu, samples=20)["p"] == 1
