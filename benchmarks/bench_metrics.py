"""Metrics beside scikit-learn, sacrebleu and rouge-score: seconds and peak memory of one call.

A million rows of 10 labels, or of scores; 10,000 pairs of English sentences of 5 to 60 words, from the
documentation that Python carries (pydoc_data.topics), where one side has words left out, put in and swapped.
The limit of counting is reading the rows, of an area sorting the scores, of n-grams hashing each once.

Gate: the scores are the same to 1e-12 of their scale. sacrebleu remembers the tokens of lines, minift
those of words; both forget them before each call. Peak memory is what Python and numpy allocate in one call
(tracemalloc).
"""

import gc
import random
import re
import statistics
import tracemalloc
from pydoc_data.topics import topics

import numpy as np

from benchmarks.harness import alternate, gate, quantiles
from minift import metrics
from minift.metrics import porter, tokenizers

LABELS = 10
WORDS = 5, 60  # of a sentence


def run(quick: bool) -> tuple[list[dict], dict]:
    n, pairs = (100_000, 1_000) if quick else (1_000_000, 10_000)
    details, rows = {"left out": {}}, []
    for tables in (label_cases, score_cases, bleu_cases, rouge_cases):
        try:
            for case in tables(n, pairs):
                rows.append(row(*case, quick))
        except ModuleNotFoundError as error:
            details["left out"][tables.__name__.removesuffix("_cases")] = f"{error.name} is not installed"
    return rows, details


def row(metric: str, size: int, scale: float, ours, theirs, quick: bool) -> dict:
    a, b = ours(), theirs()
    if isinstance(a, str):
        gate(metric, float(a != b), 0)
    else:
        gate(metric, float(np.abs(np.asarray(a) - np.asarray(b)).max() / scale), 1e-12)
    times = alternate({"minift": ours, "peer": theirs}, 3 if quick else 5, warmup=1)
    t, peak = quantiles(times["minift"]), {"minift": peak_mib(ours), "peer": peak_mib(theirs)}
    return {
        "metric": metric,
        "rows": size,
        "ms": 1e3 * t["median"],
        "p20 - p80": f"{1e3 * t['p20']:.3g} - {1e3 * t['p80']:.3g}",
        "peer ms": 1e3 * statistics.median(times["peer"]),
        "x peer": statistics.median(b / a for a, b in zip(times["minift"], times["peer"], strict=True)),
        "peak MiB": peak["minift"],
        "peer peak MiB": peak["peer"],
    }


def peak_mib(call) -> float:
    gc.collect()
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20


def label_cases(n: int, pairs: int):
    from sklearn import metrics as sk

    generator = np.random.default_rng(0)
    y = generator.integers(0, LABELS, n)
    wrong = generator.random(n) < 0.3
    p = np.where(wrong, generator.integers(0, LABELS, n), y)
    words = np.array([f"label {i}" for i in range(LABELS)])
    texts = words[y[: n // 10]], words[p[: n // 10]]
    yield "accuracy", n, 1, lambda: metrics.accuracy(y, p), lambda: sk.accuracy_score(y, p)
    yield "confusion_matrix", n, n, lambda: metrics.confusion_matrix(y, p), lambda: sk.confusion_matrix(y, p)
    yield "f1, macro", n, 1, lambda: metrics.f1(y, p), lambda: sk.f1_score(y, p, average="macro")
    yield (
        *("f1, macro, strings", n // 10, 1),
        *(lambda: metrics.f1(*texts), lambda: sk.f1_score(*texts, average="macro")),
    )
    yield "matthews", n, 1, lambda: metrics.matthews_corrcoef(y, p), lambda: sk.matthews_corrcoef(y, p)
    yield "cohen_kappa", n, 1, lambda: metrics.cohen_kappa(y, p), lambda: sk.cohen_kappa_score(y, p)
    yield (
        *("classification_report", n, 1),
        *(lambda: metrics.classification_report(y, p), lambda: sk.classification_report(y, p)),
    )


def score_cases(n: int, pairs: int):
    from sklearn import metrics as sk

    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, n)
    score = generator.standard_normal(n) + y
    tied = np.round(score, 2)
    prob = 1 / (1 + np.exp(-score))
    for name, s in (("roc_auc", score), ("roc_auc, ties", tied)):
        yield name, n, 1, lambda s=s: metrics.roc_auc(y, s), lambda s=s: sk.roc_auc_score(y, s)
    yield (
        *("average_precision", n, 1),
        *(lambda: metrics.average_precision(y, score), lambda: sk.average_precision_score(y, score)),
    )
    yield "log_loss", n, 1, lambda: metrics.log_loss(y, prob), lambda: sk.log_loss(y, prob)


def bleu_cases(n: int, pairs: int):
    import sacrebleu
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    hypotheses, references = sentences(pairs)
    remembered = Tokenizer13a.__call__, TokenizerRegexp.__call__, tokenizers._word_13a, tokenizers._word_intl

    def afresh(metric, references):
        for cache in remembered:
            cache.cache_clear()
        return metric(hypotheses, references).score

    for name in ("bleu", "chrf"):
        yield (
            *(name, pairs, 100),
            lambda name=name: afresh(getattr(metrics, name), references),
            lambda name=name: afresh(getattr(sacrebleu, f"corpus_{name}"), [references]),
        )
    few = slice(0, pairs // 50)
    yield (
        *("ter", pairs // 50, 100),
        lambda: float(metrics.ter(hypotheses[few], references[few])),
        lambda: sacrebleu.corpus_ter(hypotheses[few], [references[few]]).score,
    )


def rouge_cases(n: int, pairs: int):
    from rouge_score.rouge_scorer import RougeScorer

    hypotheses, references = sentences(pairs)
    variants = ("rouge1", "rouge2", "rougeL")
    for stem in (False, True):
        scorer = RougeScorer(variants, use_stemmer=stem)

        def theirs(scorer=scorer):
            scores = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
            return [np.mean([score[v] for score in scores], axis=0) for v in variants]

        def ours(stem=stem):
            porter.stem.cache_clear()
            found = metrics.rouge(hypotheses, references, use_stemmer=stem, variants=variants)
            return [found[v] for v in variants]

        yield f"rouge 1, 2, L{', stemmed' if stem else ''}", pairs, 1, ours, theirs


def sentences(pairs: int) -> tuple[list[str], list[str]]:
    """Hypotheses and references: pieces of text of 5 to 60 words."""
    words = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics))).split(" ")
    chance, references, hypotheses = random.Random(0), [], []
    for _ in range(pairs):
        start = chance.randrange(len(words) - WORDS[1])
        reference = words[start : start + chance.randint(*WORDS)]
        hypothesis = []
        for word in reference:
            roll = chance.random()
            hypothesis += [] if roll < 0.1 else [chance.choice(words)] if roll < 0.2 else [word]
        i = chance.randrange(len(hypothesis) + 1)
        references.append(" ".join(reference))
        hypotheses.append(" ".join(hypothesis[i:] + hypothesis[:i] if roll < 0.3 else hypothesis))
    return hypotheses, references
