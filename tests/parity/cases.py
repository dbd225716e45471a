"""How many generated cases a metric is held to its reference on: 1,000 a metric, or MINIFT_CASES of them."""

import os

from hypothesis import settings


def cases(number: int = 1000):
    """`number` cases, fewer in the same proportion where MINIFT_CASES is below 1,000."""
    return settings(max_examples=max(1, number * int(os.environ.get("MINIFT_CASES", "1000")) // 1000))


CASES = cases()
