"""Perplexity, from summed nats: exp(nats / tokens)."""

import math


def perplexity(nats: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood per token, weighted by tokens; infinite where exp overflows."""
    if tokens < 1:
        raise ValueError(f"perplexity over {tokens} tokens is undefined; count at least one predicted token")
    try:
        return math.exp(nats / tokens)
    except OverflowError:
        return math.inf
