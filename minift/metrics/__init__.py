"""Metrics in numpy alone; importing this package needs neither torch nor the rest of minift."""

from minift.metrics.language_model import perplexity
from minift.metrics.rouge import rouge

__all__ = ["perplexity", "rouge"]
