"""Text from a language model: `generate` gives new tokens, `stream` text as it comes; batched, with a cache.

The parts: sampling.py (how the next token is chosen), beam.py (beam search), texts.py (padding, mask, cache),
pieces.py (text that is certain, stop strings).

Greedy tokens in fp32 do not depend on the batch, on padding or on the cache. A sampled text depends on the
seed, its place among the prompts, and its own prompt: the numbers it draws are its own (sampling.uniforms),
and what is next to it changes its probabilities by rounding alone.
"""

from collections.abc import Iterator

import torch

from minift.models.beam import beam_search
from minift.models.interface import LanguageModel
from minift.models.pieces import Pieces
from minift.models.sampling import Decoding, distribution, draw, penalize, uniforms
from minift.models.texts import Texts

GENERATING = ("causal_lm", "seq2seq_lm")  # heads that give the next token


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    tokenizer=None,
    eos_ids=None,
    pad_id: int = 0,
    use_cache: bool = True,
    **decoding,
) -> list[list[int]]:
    """Continue each prompt (token ids) until one of `eos_ids` or `max_new_tokens`; the new ids, without EOS.

    An encoder-decoder's encoder reads the prompts. `decoding` are the fields of sampling.Decoding. `eos_ids`
    are the tokenizer's by default. A row that a `stop` string ended has the ids of the text before it
    (pieces.cut). `use_cache=False` reads the whole text again at every step.
    """
    how = Decoding(**decoding)
    _check(model, prompts, max_new_tokens, how, tokenizer, pad_id)
    ends, texts = _ends(eos_ids, tokenizer), Texts(model, prompts, max_new_tokens, pad_id, use_cache)
    if how.num_beams > 1:
        return beam_search(texts, max_new_tokens, how, ends)
    rows = [Pieces(ends, tokenizer if how.stop else None, how.stop) for _ in prompts]
    for _ in _grow(texts, max_new_tokens, how, rows):
        pass
    return [row.ids for row in rows]


def stream(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    tokenizer,
    *,
    eos_ids=None,
    pad_id: int = 0,
    use_cache: bool = True,
    **decoding,
) -> Iterator[tuple[int, str]]:
    """As `generate`, giving (row, piece of its text) as soon as the piece is certain.

    The pieces of a row together are its text: that of its ids, cut before a stop string to the character.
    """
    if tokenizer is None:
        raise ValueError("stream gives text and needs the model's tokenizer; generate gives token ids")
    how = Decoding(**decoding)
    _check(model, prompts, max_new_tokens, how, tokenizer, pad_id)
    if how.num_beams > 1:
        raise ValueError(
            f"num_beams is {how.num_beams}, and beam search has no text before its end; use generate"
        )
    rows = [Pieces(_ends(eos_ids, tokenizer), tokenizer, how.stop) for _ in prompts]
    return _grow(Texts(model, prompts, max_new_tokens, pad_id, use_cache), max_new_tokens, how, rows)


@torch.inference_mode()
def _grow(texts: Texts, max_new_tokens: int, how: Decoding, rows: list[Pieces]) -> Iterator[tuple[int, str]]:
    """Add tokens to the rows until each has ended; gives (row, piece)."""
    if how.temperature > 0:
        each = [uniforms(how.seed, row, max_new_tokens) for row in range(len(rows))]
        u = torch.stack(each, dim=1).to(texts.ids.device)  # (n, B)
    for step in range(max_new_tokens):
        scores = penalize(texts.logits(), texts.seen(), how.repetition_penalty)  # (B, V)
        greedy = how.temperature == 0
        tokens = scores.argmax(dim=-1) if greedy else draw(*distribution(scores, how), u[step])  # (B,)
        for row, token in enumerate(tokens.tolist()):
            if not rows[row].done and (piece := rows[row].add(token)):
                yield row, piece
        if all(row.done for row in rows):
            return
        texts.append(tokens)
    for row, pieces in enumerate(rows):
        if not pieces.done and (piece := pieces.end()):
            yield row, piece


def _ends(eos_ids, tokenizer) -> set[int]:
    if eos_ids is None:
        eos_ids = () if tokenizer is None else tokenizer.eos_ids
    return {eos_ids} if isinstance(eos_ids, int) else set(eos_ids)


def _check(model, prompts, max_new_tokens, how, tokenizer, pad_id):
    if model.head_kind not in GENERATING:
        raise ValueError(
            f"generate needs a head that gives the next token, {' or '.join(GENERATING)}, and this model has "
            f"the head {model.head_kind}; load it with another"
        )
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    if isinstance(prompts, str) or any(isinstance(p, str) or not isinstance(p[0], int) for p in prompts):
        raise ValueError("prompts are lists of token ids; encode texts with the tokenizer first")
    V = model.dims.vocab
    if not 0 <= pad_id < V:
        raise ValueError(f"pad_id is {pad_id}; the vocabulary is 0 to {V - 1}")
    for wrong in (max(map(max, prompts)), min(map(min, prompts))):
        if not 0 <= wrong < V:
            raise ValueError(
                f"prompt id {wrong}, the vocabulary is 0 to {V - 1}; use the tokenizer that belongs to the "
                "model"
            )
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    virtual, longest, context = model.virtual_tokens, max(map(len, prompts)), model.dims.context
    if virtual + longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens, {max_new_tokens} new ones"
            + (f" and {virtual} virtual ones" if virtual else "")
            + f" exceed the model's context of {context}; shorten the prompt or lower max_new_tokens"
        )
    if how.stop and tokenizer is None:
        raise ValueError(f"stop is {how.stop!r}, and texts need a tokenizer to be found; give tokenizer=...")
    if how.num_beams > 1 and model.adapters.by_rows():
        raise ValueError(
            f"num_beams is {how.num_beams}, and adapters were chosen for each text of the batch, which beam "
            "search does not keep apart; generate with one adapter at a time"
        )
