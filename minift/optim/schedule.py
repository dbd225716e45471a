"""The learning rate as a pure function of the step, so that a resumed run needs to know the step alone.

    warm-up    (step + 1) / warmup                          for step < warmup
    constant   1
    linear     1 - t                                        t = (step - warmup) / (total - warmup)
    cosine     (1 + cos(pi t)) / 2                          Loshchilov and Hutter 2016, arXiv:1608.03983

each times the peak rate. Steps count from 0; the first step of a warm-up already moves.
"""

import math

SCHEDULES = {
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
}


def lr_at(step: int, total: int, peak: float, warmup: int, schedule: str) -> float:
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * SCHEDULES[schedule]((step - warmup) / max(1, total - warmup))
