"""Rows to token ids with completion-only labels, the order of an epoch, padded batches."""

from dataclasses import dataclass

import numpy as np
import torch

from minift.data.tokenizer import Tokenizer

IGNORED = -100  # the label of a position without a loss
TEMPLATES = ("none", "chat")


@dataclass(frozen=True)
class Example:
    ids: list[int]
    prompt_length: int  # leading ids that are not learned
    where: str  # file and line, for messages

    def __len__(self):
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Predicted completion tokens; the very first token of a text has no prediction."""
        return len(self.ids) - max(1, self.prompt_length)


def encode_prompt(tokenizer: Tokenizer, prompt: str, template: str) -> list[int]:
    """`none`: the prompt as it stands, with BOS where the tokenizer wants one. `chat`: as one user turn."""
    if template not in TEMPLATES:
        raise ValueError(f"template {template!r} is not one of {', '.join(TEMPLATES)}")
    if template == "chat":
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids, bare = tokenizer.encode(prompt, special_tokens=True), tokenizer.encode(prompt)
    if ids and ids[-1] in tokenizer.eos_ids and ids[-1 - len(bare) : -1] == bare:
        return ids[:-1]  # an EOS that the tokenizer adds belongs behind the completion
    return ids


def encode_row(tokenizer: Tokenizer, row: dict, template: str, max_length: int) -> Example:
    """Prompt and completion are tokenized apart, as generation meets them; the completion ends with EOS."""
    if not tokenizer.eos_ids:
        raise ValueError("the tokenizer names no end-of-text token, so a completion could never end")
    prompt = encode_prompt(tokenizer, row["prompt"], template)
    ids = prompt + tokenizer.encode(row["completion"]) + [tokenizer.eos_ids[0]]
    if len(ids) > max_length:
        raise ValueError(
            f"{row['where']}: prompt and completion have {len(ids)} tokens, the limit is {max_length}; "
            "shorten the row or raise train.max_length (up to the model's context)"
        )
    return Example(ids, len(prompt), row["where"])


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..n-1 that depends on (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n).tolist()


def micro_batches(examples: list[Example], max_tokens: int) -> list[list[Example]]:
    """An effective batch cut into pieces of like length, each within `max_tokens` padded, or one row.

    The sum of the gradients does not depend on the cut; padding, memory and speed do.
    """
    parts = []
    for example in sorted(examples, key=len):
        if parts and (len(parts[-1]) + 1) * len(example) <= max_tokens:
            parts[-1].append(example)
        else:
            parts.append([example])
    return parts


def collate(examples: list[Example], pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each (B, T), padded on the right."""
    B, T = len(examples), max(map(len, examples))
    ids = torch.full((B, T), pad_id)
    labels = torch.full((B, T), IGNORED)
    mask = torch.zeros(B, T, dtype=torch.long)
    for row, example in enumerate(examples):
        n, first = len(example), max(1, example.prompt_length)
        tokens = torch.tensor(example.ids)
        ids[row, :n], mask[row, :n], labels[row, first:n] = tokens, 1, tokens[first:]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}
