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

from minift.metrics.agreement import (
    cohen_kappa,
    coincidences,
    fleiss_kappa,
    krippendorff_alpha,
    table_counts,
)
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
from minift.metrics.edit_distance import (
    character_error_rate,
    character_errors,
    word_error_rate,
    word_errors,
)
from minift.metrics.entities import (
    entity_counts,
    entity_f1,
    entity_precision,
    entity_recall,
    entity_report,
)
from minift.metrics.fairness import (
    demographic_parity_difference,
    equalized_odds_difference,
    group_counts,
    group_rates,
    group_right,
    worst_group_accuracy,
)
from minift.metrics.language_model import (
    bits_per_byte,
    bits_per_character,
    cross_entropy,
    nll,
    perplexity,
)
from minift.metrics.meteor import meteor, meteor_rows
from minift.metrics.preferences import bradley_terry, duel_counts, outcome_counts, win_rate
from minift.metrics.probabilities import brier, log_loss, logs, squared_errors
from minift.metrics.ranking import average_precision, roc_auc, top_k_accuracy
from minift.metrics.regression import (
    absolute_errors,
    mae,
    moments,
    mse,
    pairs,
    pearson,
    r2,
    rmse,
    spearman,
)
from minift.metrics.rouge import rouge, rouge_rows
from minift.metrics.sampling import leader_counts, maj_at_k, pass_at_k, problem_counts
from minift.metrics.ter import ter, ter_counts
from minift.metrics.uncertainty import difference_sums, discordant, mcnemar, paired_difference

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
    cohen_kappa: confusion,
    fleiss_kappa: table_counts,
    krippendorff_alpha: coincidences,
    win_rate: outcome_counts,
    bradley_terry: duel_counts,
    pass_at_k: problem_counts,
    maj_at_k: leader_counts,
    paired_difference: difference_sums,
    mcnemar: discordant,
    roc_auc: scored,
    average_precision: scored,
    top_k_accuracy: scored,
    roc_curve: scored,
    precision_recall_curve: scored,
    log_loss: logs,
    brier: squared_errors,
    expected_calibration_error: binned,
    reliability_curve: binned,
    bleu: bleu_counts,
    ter: ter_counts,
    rouge: rouge_rows,
    meteor: meteor_rows,
    exact_match: exact_matches,
    token_f1: token_f1s,
    word_error_rate: word_errors,
    character_error_rate: character_errors,
    chrf: chrf_counts,
    distinct_n: distinct_counts,
    entity_precision: entity_counts,
    entity_recall: entity_counts,
    entity_f1: entity_counts,
    entity_report: entity_counts,
    cross_entropy: nll,
    perplexity: nll,
    bits_per_byte: nll,
    bits_per_character: nll,
    group_rates: group_counts,
    demographic_parity_difference: group_counts,
    equalized_odds_difference: group_counts,
    worst_group_accuracy: group_right,
    mse: moments,
    rmse: moments,
    r2: moments,
    pearson: moments,
    mae: absolute_errors,
    spearman: pairs,
}


class State:
    """A metric over batches: `update` takes its rows, `merge` another state, `compute` scores all."""

    def __init__(self, metric, **settings):
        from_name = getattr(metric, "__name__", metric)
        if metric not in STREAMS:
            known = ", ".join(m.__name__ for m in STREAMS)
            raise ValueError(f"{from_name} has no statistics that add; those that have: {known}")
        takes = inspect.signature(STREAMS[metric]).parameters.values()
        rows = [p.name for p in takes if p.default is p.empty and p.name not in settings]
        self.blanks = [None] * (len(rows) - 1)  # the statistics stand for the first, and for all
        inspect.signature(metric).bind(None, *self.blanks, **settings)
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
        return self.metric(self.statistics, *self.blanks, **self.settings)
