"""Metrics over batches: the counts and sums that a metric needs, which add exactly.

    state = State(f1, average="macro")
    for batch in batches: state.update(y_true, y_pred)
    state.compute()

equals `f1` of all rows to the bit, in any split into batches and any order, and states of several processes
merge. It holds by construction: a metric is a function of statistics, and statistics are integers, exact
sums (exact.py) or the rows' scores, never means. COUNTS names the function that counts for each metric, and a
metric takes what that function counted, with the same settings, in place of its rows.
"""

import copy
import difflib
import inspect

from minift.metrics.agreement import cohen_kappa, coincidences, fleiss_kappa, krippendorff_alpha, table_counts
from minift.metrics.answers import exact_match, exact_matches, token_f1, token_f1s
from minift.metrics.bleu import bleu, bleu_counts
from minift.metrics.calibration import binned, expected_calibration_error, reliability_curve
from minift.metrics.chrf import chrf, chrf_counts
from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall, specificity
from minift.metrics.columns import scored
from minift.metrics.confusion import (
    accuracy,
    balanced_accuracy,
    confusion,
    confusion_matrix,
    matthews_corrcoef,
)
from minift.metrics.curves import precision_recall_curve, roc_curve
from minift.metrics.diversity import distinct_counts, distinct_n
from minift.metrics.edit_distance import character_error_rate, character_errors, word_error_rate, word_errors
from minift.metrics.entities import entity_counts, entity_f1, entity_precision, entity_recall, entity_report
from minift.metrics.fairness import (
    demographic_parity_difference,
    equalized_odds_difference,
    group_counts,
    group_rates,
    group_right,
    worst_group_accuracy,
)
from minift.metrics.language_model import bits_per_byte, bits_per_character, cross_entropy, nll, perplexity
from minift.metrics.meteor import meteor, meteor_rows
from minift.metrics.preferences import bradley_terry, duel_counts, outcome_counts, win_rate
from minift.metrics.probabilities import brier, log_loss, logs, squared_errors
from minift.metrics.ranking import average_precision, roc_auc, top_k_accuracy
from minift.metrics.regression import absolute_errors, mae, moments, mse, pairs, pearson, r2, rmse, spearman
from minift.metrics.report import classification_report
from minift.metrics.rouge import rouge, rouge_rows
from minift.metrics.sampling import leader_counts, maj_at_k, pass_at_k, problem_counts
from minift.metrics.ter import ter, ter_counts
from minift.metrics.totals import Rows
from minift.metrics.uncertainty import difference_sums, discordant, mcnemar, paired_difference

COUNTS = {  # the function that counts the statistics of -> these metrics
    confusion: (
        confusion_matrix,
        accuracy,
        balanced_accuracy,
        matthews_corrcoef,
        precision,
        recall,
        specificity,
        f1,
        fbeta,
        jaccard,
        hamming_loss,
        cohen_kappa,
        classification_report,
    ),
    table_counts: (fleiss_kappa,),
    coincidences: (krippendorff_alpha,),
    outcome_counts: (win_rate,),
    duel_counts: (bradley_terry,),
    problem_counts: (pass_at_k,),
    leader_counts: (maj_at_k,),
    difference_sums: (paired_difference,),
    discordant: (mcnemar,),
    scored: (roc_auc, average_precision, top_k_accuracy, roc_curve, precision_recall_curve),
    logs: (log_loss,),
    squared_errors: (brier,),
    binned: (expected_calibration_error, reliability_curve),
    bleu_counts: (bleu,),
    ter_counts: (ter,),
    rouge_rows: (rouge,),
    meteor_rows: (meteor,),
    exact_matches: (exact_match,),
    token_f1s: (token_f1,),
    word_errors: (word_error_rate,),
    character_errors: (character_error_rate,),
    chrf_counts: (chrf,),
    distinct_counts: (distinct_n,),
    entity_counts: (entity_precision, entity_recall, entity_f1, entity_report),
    nll: (cross_entropy, perplexity, bits_per_byte, bits_per_character),
    group_counts: (group_rates, demographic_parity_difference, equalized_odds_difference),
    group_right: (worst_group_accuracy,),
    moments: (mse, rmse, r2, pearson),
    absolute_errors: (mae,),
    pairs: (spearman,),
}
STREAMS = {metric: count for count, metrics in COUNTS.items() for metric in metrics}


class State:
    """A metric over batches: `update` takes its rows, `merge` another state, `compute` scores all."""

    def __init__(self, metric, **settings):
        if not callable(metric):
            raise ValueError(f"{metric!r} is no metric; give the function, as minift.metrics.f1")
        if metric not in STREAMS:
            name, known = getattr(metric, "__name__", repr(metric)), [m.__name__ for m in STREAMS]
            near = difflib.get_close_matches(name, known, n=3, cutoff=0)
            raise ValueError(
                f"{name} has no statistics that add, as {', '.join(near)} have (STREAMS has all)"
            )
        settings = {k: copy.deepcopy(getattr(v, "tolist", lambda v=v: v)()) for k, v in settings.items()}
        takes = inspect.signature(STREAMS[metric]).parameters.values()
        rows = [p.name for p in takes if p.default is p.empty and p.name not in settings]
        self.blanks = [None] * (len(rows) - 1)  # the statistics stand for the first, and for all
        inspect.signature(metric).bind(None, *self.blanks, **settings)
        self.metric, self.settings, self.statistics = metric, settings, None

    def update(self, *rows) -> "State":
        if len(rows) != 1 + len(self.blanks):
            raise ValueError(
                f"{self.metric.__name__} takes {1 + len(self.blanks)} arguments for rows, not {len(rows)}; "
                "settings go to State(...)"
            )
        count = STREAMS[self.metric]
        takes = inspect.signature(count).parameters
        new = count(*rows, **{k: v for k, v in self.settings.items() if k in takes})
        if isinstance(new, Rows):
            new = Rows(*(column.copy() for column in new))  # the caller may fill its arrays anew
        return self._add(new)

    def merge(self, other: "State") -> "State":
        if self.metric != other.metric or repr(self.settings) != repr(other.settings):  # nan is not nan
            raise ValueError(
                f"a state of {self.metric.__name__} with {self.settings} does not merge with one of "
                f"{other.metric.__name__} with {other.settings}; give both the same metric and settings"
            )
        return self if other.statistics is None else self._add(other.statistics)

    def _add(self, new) -> "State":
        try:
            self.statistics = new if self.statistics is None else self.statistics + new
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"this batch does not add to those before it: {error}") from error
        return self

    def compute(self):
        if self.statistics is None:
            raise ValueError(f"the state of {self.metric.__name__} has seen no rows; update it first")
        return self.metric(self.statistics, *self.blanks, **self.settings)
