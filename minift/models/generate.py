"""Text from a decoder: greedy, temperature, top-k, top-p; batched, with a KV cache.

    next token ~ softmax(logits / temperature), cut to the top_k largest and to the smallest set whose
    probability reaches top_p;   temperature 0 takes the argmax

Source of top-p: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
"""

import torch

from minift.models.interface import LanguageModel


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos_ids=(),
    pad_id: int = 0,
    seed: int = 0,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue each prompt (token ids) until one of `eos_ids` or `max_new_tokens`; the new ids, without EOS.

    Prompts of different lengths are padded on the left. `use_cache=False` reads the whole text again at
    every step; greedy tokens are the same in fp32.
    """
    _check(model, prompts, max_new_tokens, temperature, top_k, top_p)
    B, longest = len(prompts), max(map(len, prompts))
    ids = torch.full((B, longest), pad_id)
    mask = torch.zeros(B, longest + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    random = torch.Generator(model.device).manual_seed(seed)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=model.device)
    cache = model.new_cache(B, longest + max_new_tokens) if use_cache else None
    finished = torch.zeros(B, dtype=torch.bool, device=model.device)
    new, fed = [[] for _ in prompts], ids  # fed (B, T): what the model reads next
    for length in range(longest, longest + max_new_tokens):
        hidden = model.backbone(fed, attention_mask=mask[:, :length], cache=cache)
        token = _choose(model.head(hidden[:, -1]), temperature, top_k, top_p, random)  # (B,)
        finished |= torch.isin(token, ends)
        if finished.all():
            break
        for row in (~finished).nonzero().flatten().tolist():
            new[row].append(int(token[row]))
        fed = token[:, None] if use_cache else torch.cat((fed, token[:, None]), dim=1)
    return new


def _choose(logits, temperature, top_k, top_p, random):
    """logits (B, V) -> token (B,)."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = (
        logits - logits.amax(dim=-1, keepdim=True)
    ) / temperature  # at most 0, however small the temperature
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the more likely tokens
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)  # keeps the one that reaches top_p
    chosen = torch.multinomial(probabilities, 1, generator=random)  # (B, 1), weights need not sum to 1
    return tokens.gather(1, chosen)[:, 0]


def _check(model, prompts, max_new_tokens, temperature, top_k, top_p):
    if not prompts or not all(prompts):
        raise ValueError("generate needs at least one prompt, and at least one token in each")
    if max(map(max, prompts)) >= model.config.vocab_size or min(map(min, prompts)) < 0:
        raise ValueError(
            f"prompt id {max(map(max, prompts))}, the vocabulary is 0 to {model.config.vocab_size - 1}; "
            "use the tokenizer that belongs to the model"
        )
    context, longest = model.config.max_position_embeddings, max(map(len, prompts))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    virtual = model.virtual_tokens
    if virtual + longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens, {max_new_tokens} new ones"
            + (f" and {virtual} virtual ones" if virtual else "")
            + f" exceed the model's context of {context}; shorten the prompt or lower max_new_tokens"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or positive and finite")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"top_k is {top_k} and top_p is {top_p}; top_k is 0 (off) or positive, 0 < top_p <= 1"
        )
