"""Beam search: the likeliest continuations of each text, several at a time.

    score(y) = log p(y | x) / |y|^length_penalty       |y| new tokens, EOS among them

A beam is a continuation with its log p(y | x). At every step the num_beams open beams of a text have V
continuations each. Those of the num_beams best that end, by EOS or by the last step, are finished, and a text
keeps the num_beams finished ones that score best; the num_beams best that do not end are the open beams of
the next step. A text is done when it has num_beams finished beams and its best open one would not score
above the worst of them; at which length, or whether that is asked at all, is `early_stopping`. The result is
the best finished beam.

Source: Wu et al. 2016, arXiv:1609.08144, section 7, whose length penalty is another one; this one, and when
a text is done, are as in transformers.
"""

import torch

from minift.models.sampling import Decoding, penalize
from minift.models.texts import Texts


def beam_search(texts: Texts, max_new_tokens: int, how: Decoding, ends: set[int]) -> list[list[int]]:
    """The new ids of each text's best beam, without EOS."""
    B, n, V = len(texts.ids), how.num_beams, texts.model.dims.vocab
    device = texts.ids.device
    eos = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    open_ = torch.zeros(B, 1, device=device)  # (B, width): log p; one beam of each text before the first step
    finished = [Finished(how, max_new_tokens) for _ in range(B)]
    for length in range(1, max_new_tokens + 1):
        width = open_.shape[1]
        log_p = penalize(texts.logits().log_softmax(dim=-1), texts.seen(), how.repetition_penalty)
        log_p = (open_.view(-1, 1) + log_p).view(B, width * V)
        # At most width * len(ends) of them end, so the n best that do not are among this many.
        best, places = log_p.topk(min(n + width * len(ends), width * V))  # (B, C), best first
        beams = places // V + width * torch.arange(B, device=device)[:, None]  # rows of texts
        tokens = places % V
        over = torch.isin(tokens, eos) | (length == max_new_tokens)
        for row, at in over[:, :n].nonzero().tolist():
            ids = [*texts.ids[beams[row, at], texts.start : texts.length].tolist(), int(tokens[row, at])]
            finished[row].add(float(best[row, at]), length, ids[:-1] if ids[-1] in ends else ids)
        go_on = over.int().argsort(dim=1, stable=True)[:, : min(n, width * (V - len(ends)))]  # best first
        if length == max_new_tokens or not go_on.numel():
            break
        open_ = best.gather(1, go_on)
        for row, log_p_best in enumerate(open_[:, 0].tolist()):
            finished[row].close(log_p_best, length)
        if all(f.done for f in finished):
            break
        texts.reorder(beams.gather(1, go_on).flatten())
        texts.append(tokens.gather(1, go_on).flatten())
    return [f.beams[0][1] for f in finished]


class Finished:
    """The best finished beams of one text, best first."""

    def __init__(self, how: Decoding, max_new_tokens: int):
        self.how, self.max_new_tokens = how, max_new_tokens
        self.beams = []  # (score, ids)
        self.done = False  # no beam is added any more

    def add(self, log_p: float, length: int, ids: list[int]) -> None:
        if not self.done:
            self.beams.append((log_p / length**self.how.length_penalty, ids))
            self.beams.sort(key=lambda beam: -beam[0])
            del self.beams[self.how.num_beams :]

    def close(self, log_p: float, length: int) -> None:
        """See whether the text is done; log_p is that of the best open beam, of this length."""
        if len(self.beams) < self.how.num_beams:
            return
        if self.how.early_stopping == "never" and self.how.length_penalty > 0:
            length = self.max_new_tokens  # log p is negative: the longer, the higher a score may be
        best = log_p / length**self.how.length_penalty
        self.done |= self.how.early_stopping is True or best <= self.beams[-1][0]
