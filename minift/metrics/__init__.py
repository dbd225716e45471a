"""Metrics in numpy alone; importing this package needs neither torch nor the rest of minift."""

from minift.metrics.classification import (
    accuracy,
    confusion_matrix,
    f1,
    paired_difference,
    precision,
    recall,
    wilson,
)
from minift.metrics.language_model import perplexity
from minift.metrics.rouge import rouge

__all__ = [
    "accuracy",
    "confusion_matrix",
    "f1",
    "paired_difference",
    "perplexity",
    "precision",
    "recall",
    "rouge",
    "wilson",
]
