"""Metrics in numpy alone; importing this package needs neither torch nor the rest of minift.

FAMILIES lists every metric in reading order. Those of streaming.STREAMS also run over batches (State).
"""

from minift.metrics.checks import MetricWarning
from minift.metrics.classification import f1, fbeta, hamming_loss, jaccard, precision, recall, specificity
from minift.metrics.confusion import accuracy, balanced_accuracy, confusion_matrix, matthews_corrcoef
from minift.metrics.language_model import perplexity
from minift.metrics.report import classification_report
from minift.metrics.rouge import rouge
from minift.metrics.streaming import State
from minift.metrics.uncertainty import paired_difference, wilson

FAMILIES = {
    "labels": (
        *(accuracy, balanced_accuracy, precision, recall, specificity, f1, fbeta, jaccard, hamming_loss),
        *(matthews_corrcoef, confusion_matrix, classification_report),
    ),
    "texts": (rouge,),
    "language models": (perplexity,),
    "uncertainty": (wilson, paired_difference),
}
__all__ = [metric.__name__ for metrics in FAMILIES.values() for metric in metrics] + [
    "FAMILIES",
    "MetricWarning",
    "State",
]
