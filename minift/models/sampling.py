"""How the next token is chosen: what can be asked for, and the formulas.

    s_i  <-  s_i / r  where s_i >= 0,  s_i * r  where s_i < 0,   for each token i that the text holds
    p     =  softmax(s / temperature)
    kept  =  the top_k likeliest;  of them the smallest set whose share of p reaches top_p;
             of them those with p_i >= min_p * max p
    token =  the first kept one whose cumulated p exceeds u * (p of all the kept),   u uniform on [0, 1)

r is the repetition penalty; temperature 0 takes the largest s.

Sources: top-k: Fan et al. 2018, arXiv:1805.04833, section 5.4; top-p: Holtzman et al. 2020, arXiv:1904.09751,
section 3.1; min-p: Nguyen et al. 2024, arXiv:2407.01082, section 3; repetition penalty: Keskar et al. 2019,
arXiv:1909.05858, section 4.1, where scores are taken as positive; the order of the steps and the product for
negative scores are those of transformers.
"""

from dataclasses import dataclass

import torch

from minift.models.randomness import generator


@dataclass(frozen=True)
class Decoding:
    """How to decode: the keyword arguments of `generate` and `stream`."""

    temperature: float = 0.0
    """Zero is greedy."""
    top_k: int = 0
    """How many tokens to keep at most; zero keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Above one, tokens of the text become less likely; prompt tokens count in a decoder's text."""
    num_beams: int = 1
    length_penalty: float = 1.0
    """A finished beam's score is its log probability over its length to this power (models/beam.py)."""
    early_stopping: bool | str = False
    """A text with num_beams finished beams is done: with True at once; with False when the best open beam, as
    long as it is, scores below them; with "never" when it would do so at full length."""
    stop: str | tuple[str, ...] = ()
    """Strings that end a text and are cut off it; they need the tokenizer. Special tokens are no text."""
    seed: int = 0

    def __post_init__(self):
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", strings)
        self._check_ranges()
        self._check_together()

    def _check_ranges(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0 (greedy) or positive and finite"
            )
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"top_k is {self.top_k}, top_p is {self.top_p} and min_p is {self.min_p}; top_k is 0 (off) "
                "or positive, 0 < top_p <= 1, 0 <= min_p <= 1"
            )
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must be positive and finite, 1 is off"
            )
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; it must be at least 1, which is no beam search")
        if not abs(self.length_penalty) <= 10:
            raise ValueError(f"length_penalty is {self.length_penalty}; it must be from -10 to 10")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it is True, False or 'never'")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; give texts of at least one character")

    def _check_together(self):
        beams = f"num_beams is {self.num_beams}"
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"{beams} and temperature is {self.temperature}, but beam search draws nothing; leave one out"
            )
        if self.num_beams > 1 and self.stop:
            raise ValueError(
                f"{beams} and stop is {self.stop!r}, but beams end at eos_ids alone; leave one out"
            )
        for name in ("length_penalty", "early_stopping"):
            if self.num_beams == 1 and getattr(self, name) != getattr(Decoding, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and {beams}, but {name} is for beam search; raise "
                    f"num_beams or leave {name} out"
                )
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) != getattr(Decoding, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} and temperature is 0, which takes the likeliest token; "
                    f"raise temperature or leave {name} out"
                )


def penalize(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores (B, V) with the repetition penalty on the tokens in seen (B, T)."""
    if penalty == 1:
        return scores
    held = scores.gather(1, seen)  # (B, T)
    return scores.scatter(1, seen, torch.where(held < 0, held * penalty, held / penalty))


def distribution(scores: torch.Tensor, how: Decoding) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities (B, K) of the tokens (B, K), not scaled to sum to 1; zero for those that are left out."""
    V = scores.shape[-1]
    if how.top_k or how.top_p < 1:  # likeliest first
        scores, tokens = scores.topk(min(how.top_k or V, V))  # (B, K)
    else:
        tokens = torch.arange(V, device=scores.device).expand_as(scores)
    # The largest score becomes 0, so that none overflows, however small the temperature.
    p = ((scores - scores.amax(dim=-1, keepdim=True)).double() / how.temperature).softmax(dim=-1)
    if how.top_p < 1:
        before = p.cumsum(dim=-1) - p  # share of the likelier ones
        p = p.masked_fill(before >= how.top_p, 0.0)  # keeps the one that reaches top_p
    return p.masked_fill(p < how.min_p * p.amax(dim=-1, keepdim=True), 0.0), tokens


def draw(p: torch.Tensor, tokens: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """One token of each row: p and tokens (B, K), u (B,) at most 1 - 2^-53, all fp64 -> (B,)."""
    reached = p.cumsum(dim=-1)
    before = reached <= u[:, None] * reached[:, -1:]  # (B, K); u * total < total, so not the last p > 0
    return tokens.gather(1, before.sum(dim=-1, keepdim=True))[:, 0]


def uniforms(seed: int, row: int, n: int) -> torch.Tensor:
    """The numbers u (n,) of a row's steps: they depend on (seed, row), and the first ones not on n."""
    return torch.rand(n, generator=generator(seed, f"text {row}"), dtype=torch.float64)
