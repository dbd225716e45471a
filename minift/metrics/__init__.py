"""Metrics in numpy alone; importing this package needs neither torch nor the rest of minift.

FAMILIES lists every metric in reading order. Those of streaming.STREAMS also run over batches (State).
"""

from minift.metrics.agreement import cohen_kappa, fleiss_kappa, krippendorff_alpha
from minift.metrics.answers import exact_match, token_f1
from minift.metrics.bleu import bleu, sentence_bleu
from minift.metrics.calibration import expected_calibration_error, reliability_curve
from minift.metrics.checks import MetricWarning
from minift.metrics.chrf import chrf, sentence_chrf
from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall, specificity
from minift.metrics.confusion import accuracy, balanced_accuracy, confusion_matrix, matthews_corrcoef
from minift.metrics.curves import precision_recall_curve, roc_curve
from minift.metrics.diversity import distinct_n, self_bleu
from minift.metrics.edit_distance import character_error_rate, edit_distance, word_error_rate
from minift.metrics.entities import entity_f1, entity_precision, entity_recall, entity_report
from minift.metrics.extraction import final_number
from minift.metrics.fairness import (
    demographic_parity_difference,
    equalized_odds_difference,
    group_rates,
    worst_group_accuracy,
)
from minift.metrics.language_model import bits_per_byte, bits_per_character, cross_entropy, perplexity
from minift.metrics.meteor import meteor
from minift.metrics.preferences import aggregate_ratings, bradley_terry, win_rate
from minift.metrics.probabilities import brier, log_loss
from minift.metrics.ranking import average_precision, roc_auc, top_k_accuracy
from minift.metrics.regression import mae, mse, pearson, r2, rmse, spearman
from minift.metrics.report import classification_report
from minift.metrics.resampling import approximate_randomization, bootstrap, compare, paired_bootstrap
from minift.metrics.rouge import rouge
from minift.metrics.sampling import maj_at_k, pass_at_k
from minift.metrics.streaming import State
from minift.metrics.ter import ter
from minift.metrics.uncertainty import mcnemar, paired_difference, wilson

FAMILIES = {
    "labels": (
        *(accuracy, balanced_accuracy, precision, recall, specificity, f1, fbeta, jaccard, hamming_loss),
        *(matthews_corrcoef, confusion_matrix, classification_report),
    ),
    "scores": (roc_auc, average_precision, top_k_accuracy, roc_curve, precision_recall_curve),
    "probabilities": (log_loss, brier, expected_calibration_error, reliability_curve),
    "texts": (
        *(bleu, sentence_bleu, chrf, sentence_chrf, ter, rouge, meteor, exact_match, token_f1),
        *(edit_distance, word_error_rate, character_error_rate, distinct_n, self_bleu),
    ),
    "entities": (entity_precision, entity_recall, entity_f1, entity_report),
    "regression": (mse, rmse, mae, r2, pearson, spearman),
    "language models": (cross_entropy, perplexity, bits_per_byte, bits_per_character),
    "agreement": (cohen_kappa, fleiss_kappa, krippendorff_alpha),
    "preferences": (aggregate_ratings, win_rate, bradley_terry),
    "sampling": (pass_at_k, maj_at_k),
    "fairness": (group_rates, demographic_parity_difference, equalized_odds_difference, worst_group_accuracy),
    "uncertainty": (
        *(wilson, paired_difference, mcnemar),
        *(bootstrap, paired_bootstrap, approximate_randomization, compare),
    ),
}
__all__ = [metric.__name__ for metrics in FAMILIES.values() for metric in metrics] + [
    "FAMILIES",
    "MetricWarning",
    "State",
    "final_number",
]
