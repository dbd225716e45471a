"""Rows to token ids and labels, the order of an epoch, padded batches.

A causal model learns the completion behind its prompt, an encoder-decoder the completion from the prompt, a
classifier the label of its text.
"""

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

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Translation:
    """A row of an encoder-decoder; its length, which padding goes by, is that of its longer side."""

    ids: list[int]  # of the prompt, for the encoder
    completion: list[int]  # its end included
    where: str

    def __len__(self):
        return max(len(self.ids), len(self.completion))

    @property
    def supervised(self) -> int:
        return len(self.completion)

    @property
    def tokens(self) -> int:
        return len(self.ids) + len(self.completion)


@dataclass(frozen=True)
class Labelled:
    ids: list[int]
    label: int | float  # the number of a class, or a float to predict
    where: str
    types: list[int] | None = None  # token types of a pair of texts

    supervised = 1  # the label

    def __len__(self):
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.ids)


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


def encode_translation(tokenizer: Tokenizer, row: dict, template: str, max_length: int) -> Translation:
    """The prompt with the special tokens of its tokenizer; the completion with EOS."""
    if not tokenizer.eos_ids:
        raise ValueError("the tokenizer names no end-of-text token, so a completion could never end")
    if template != "none":
        raise ValueError(f"template {template!r} is for causal models; an encoder-decoder takes 'none'")
    ids = tokenizer.encode(row["prompt"], special_tokens=True)
    completion = [*tokenizer.encode(row["completion"]), tokenizer.eos_ids[0]]
    for side, tokens in (("prompt", ids), ("completion", completion)):
        if not 1 <= len(tokens) <= max_length:
            raise ValueError(
                f"{row['where']}: the {side} has {len(tokens)} tokens, and 1 to {max_length} are possible; "
                "change the row or train.max_length"
            )
    return Translation(ids, completion, row["where"])


def encode_labelled(
    tokenizer: Tokenizer,
    row: dict,
    label: int | float,
    max_length: int,
    truncate: bool = False,
    with_types: bool = False,
) -> Labelled:
    """The text, or the two, with the tokenizer's special tokens; cut at max_length only if asked to."""
    ids, types = tokenizer.encode_texts(row["text"], row.get("text_pair"), max_length if truncate else None)
    if not 1 <= len(ids) <= max_length:
        raise ValueError(
            f"{row['where']}: the text has {len(ids)} tokens, and 1 to {max_length} are possible; change the "
            "row or train.max_length, or cut longer texts with train.truncate"
        )
    return Labelled(ids, label, row["where"], types if with_types and any(types) else None)


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """A permutation of 0..n-1 that depends on (seed, epoch) alone."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n).tolist()


def micro_batches(examples: list, max_tokens: int) -> list[list]:
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


def collate(examples: list, pad_id: int, device="cpu") -> dict[str, torch.Tensor]:
    """A batch of examples of one kind, padded on the right: input_ids and attention_mask (B, T), and labels.

    labels: (B, T) of causal models, the ids behind the prompt; (B, completion) of encoder-decoders; (B,) of
    classifiers, floats where they are to be predicted as such. token_type_ids (B, T) where a row has some.
    """
    batch = {
        "input_ids": padded([e.ids for e in examples], pad_id),
        "attention_mask": padded([[1] * len(e.ids) for e in examples], 0),
    }
    if isinstance(examples[0], Labelled):
        batch["labels"] = torch.tensor([e.label for e in examples])  # (B,), int64 or float32
        if any(e.types for e in examples):
            batch["token_type_ids"] = padded([e.types or [0] * len(e) for e in examples], 0)
    elif isinstance(examples[0], Translation):
        batch["labels"] = padded([e.completion for e in examples], IGNORED)
    else:
        starts = [max(1, e.prompt_length) for e in examples]
        learned = [[IGNORED] * n + e.ids[n:] for n, e in zip(starts, examples, strict=True)]
        batch["labels"] = padded([y[: len(e)] for y, e in zip(learned, examples, strict=True)], IGNORED)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    """(rows, longest) int64, filled up on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out
