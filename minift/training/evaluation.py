"""Rows as examples that fit the model, and their mean loss."""

from pathlib import Path

import torch

from minift.data.collate import collate, encode_row, micro_batches
from minift.data.rows import check_row, read_rows
from minift.data.tokenizer import Tokenizer
from minift.models.interface import LanguageModel
from minift.training.objective import Objective
from minift.training.settings import TrainConfig


def encode(model: LanguageModel, tokenizer: Tokenizer, data, config: TrainConfig) -> list:
    """Examples from a JSONL file or a list of rows, each within the model's context and vocabulary."""
    virtual = model.virtual_tokens
    if config.max_length + virtual > model.dims.context:
        raise ValueError(
            f"train.max_length {config.max_length}"
            + (f" and {virtual} virtual tokens are" if virtual else " is")
            + f" above the model's context of {model.dims.context} tokens"
        )
    is_path = isinstance(data, str | Path)
    rows = read_rows(data) if is_path else [check_row(row, f"row {i}") for i, row in enumerate(data)]
    if not rows:
        raise ValueError("the list of rows is empty; training needs at least one row")
    examples = [encode_row(tokenizer, row, config.template, config.max_length) for row in rows]
    largest = max(max(example.ids) for example in examples)
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives id {largest}, the vocabulary ends at {model.config.vocab_size - 1}; "
            "load the tokenizer that belongs to the model"
        )
    return examples


def mean_nats(objective: Objective, examples: list, pad_id: int, micro_batch_tokens: int) -> float:
    """Token-weighted mean over all examples, with dropout off."""
    model, nats, tokens = objective.model, 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for part in micro_batches(examples, micro_batch_tokens):
            loss_sum, n = objective(collate(part, pad_id, model.device))
            nats, tokens = nats + loss_sum.item(), tokens + n
    model.train(was_training)
    return nats / tokens


def evaluate_loss(
    model: LanguageModel, tokenizer: Tokenizer, data, config: TrainConfig | None = None
) -> float:
    """Mean nats per completion token (EOS included) of a file or list of rows; exp is the perplexity."""
    config = config or TrainConfig()
    return mean_nats(
        Objective(model), encode(model, tokenizer, data, config), tokenizer.pad_id, config.micro_batch_tokens
    )
