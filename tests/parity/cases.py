"""How many generated cases each metric is held to its reference on: MINIFT_CASES, by default 1,000."""

import os

from hypothesis import settings

CASES = settings(max_examples=int(os.environ.get("MINIFT_CASES", "1000")))
