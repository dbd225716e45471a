"""Rows as examples that fit the model; their mean loss, and what a classifier says of them."""

import inspect
from pathlib import Path

import torch

from minift.data.collate import collate, encode_labelled, encode_row, encode_translation, micro_batches
from minift.data.rows import FIELDS, LABELLED, check_row, label_targets, read_rows
from minift.data.tokenizer import Tokenizer
from minift.metrics.classification import f1
from minift.metrics.confusion import accuracy
from minift.metrics.uncertainty import wilson
from minift.models.interface import LanguageModel
from minift.training.objective import Objective, rows_loss
from minift.training.settings import TrainConfig

ROWS_OF = {"causal_lm": FIELDS, "seq2seq_lm": FIELDS, "sequence_classification": LABELLED}  # head -> fields


def encode(model: LanguageModel, tokenizer: Tokenizer, data, config: TrainConfig) -> list:
    """Examples from a JSONL file or a list of rows, each within the model's context and vocabulary."""
    if model.head_kind not in ROWS_OF:
        raise ValueError(
            f"there are no rows for head {model.head_kind!r}, only for {', '.join(ROWS_OF)}; give batches of "
            "your own to training.objective.Objective"
        )
    virtual = model.virtual_tokens
    if config.max_length + virtual > model.dims.context:
        raise ValueError(
            f"train.max_length {config.max_length}"
            + (f" and {virtual} virtual tokens are" if virtual else " is")
            + f" above the model's context of {model.dims.context} tokens"
        )
    examples = _examples(model, tokenizer, _rows(data, ROWS_OF[model.head_kind]), config)
    largest = max(max([*example.ids, *getattr(example, "completion", ())]) for example in examples)
    if largest >= model.dims.vocab:
        raise ValueError(
            f"the tokenizer gives id {largest}, the vocabulary ends at {model.dims.vocab - 1}; "
            "load the tokenizer that belongs to the model"
        )
    return examples


def _rows(data, fields) -> list[dict]:
    is_path = isinstance(data, str | Path)
    rows = (
        read_rows(data, fields) if is_path else [check_row(r, f"row {i}", fields) for i, r in enumerate(data)]
    )
    if not rows:
        raise ValueError("the list of rows is empty; training needs at least one row")
    return rows


def _examples(model, tokenizer, rows, config: TrainConfig) -> list:
    most, template = config.max_length, config.template
    if model.head_kind == "sequence_classification":
        if template != "none":
            raise ValueError(f"template {template!r} is for prompts; a classifier's texts take 'none'")
        types = "token_type_ids" in inspect.signature(model.run_blocks).parameters
        targets = label_targets(rows, model.labels)
        return [
            encode_labelled(tokenizer, row, target, most, config.truncate, types)
            for row, target in zip(rows, targets, strict=True)
        ]
    if config.truncate:
        raise ValueError("train.truncate cuts the texts of classifiers; a completion cut short has no end")
    encode_one = encode_translation if model.head_kind == "seq2seq_lm" else encode_row
    return [encode_one(tokenizer, row, template, most) for row in rows]


def mean_loss(objective: Objective, examples: list, pad_id: int, micro_batch_tokens: int) -> float:
    """Over all supervised positions, each as much as any other, with dropout off."""
    model, total, count = objective.model, 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for part in micro_batches(examples, micro_batch_tokens):
            loss_sum, n = objective(collate(part, pad_id, model.device))
            total, count = total + loss_sum.item(), count + n
    model.train(was_training)
    return total / count


def evaluate_loss(
    model: LanguageModel, tokenizer: Tokenizer, data, config: TrainConfig | None = None
) -> float:
    """Mean nats per completion token (EOS included), or per label, of a file or list of rows.

    exp of the former is the perplexity. Of one label, the mean squared error.
    """
    config = config or TrainConfig()
    return mean_loss(
        Objective(model), encode(model, tokenizer, data, config), tokenizer.pad_id, config.micro_batch_tokens
    )


def row_logits(model: LanguageModel, examples: list, pad_id: int, micro_batch_tokens: int) -> torch.Tensor:
    """A sequence classifier's logits (rows, labels) in the order of the rows, fp32, with dropout off."""
    found = {}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for part in micro_batches(examples, micro_batch_tokens):
            batch = collate(part, pad_id, model.device)
            del batch["labels"]
            logits = model(**batch).float().cpu()  # (B, labels)
            found |= {id(example): row for example, row in zip(part, logits, strict=True)}
    model.train(was_training)
    return torch.stack([found[id(example)] for example in examples])


def scores(objective: Objective, examples: list, pad_id: int, micro_batch_tokens: int) -> dict:
    """eval_loss; of a classifier accuracy with its 95 % interval and macro F1 over the labels that occur."""
    model = objective.model
    if model.head_kind != "sequence_classification":
        return {"eval_loss": mean_loss(objective, examples, pad_id, micro_batch_tokens)}
    logits = row_logits(model, examples, pad_id, micro_batch_tokens)
    labels = torch.tensor([example.label for example in examples])  # (rows,)
    found = {"eval_loss": rows_loss(logits, labels).item() / len(labels)}
    if len(model.labels) == 1:
        return found
    y_true, y_pred = labels.numpy(), logits.argmax(1).numpy()
    share = accuracy(y_true, y_pred)
    return found | {
        "eval_accuracy": share,
        "eval_accuracy_interval": list(wilson(round(share * len(labels)), len(labels))),
        "eval_f1_macro": f1(y_true, y_pred, "macro", zero_division=0.0),
    }
