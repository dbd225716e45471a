"""What stands on a backbone: the kinds of heads, their labels in config.json, and how a new one starts.

A head is one linear layer on hidden states (B, T, D), `model.head`; that of a sequence classifier reads one
hidden state of each text, `model.pool`. A head that a checkpoint does not have is new: weights from
N(0, 0.02^2), as in Devlin et al. 2019 (arXiv:1810.04805) but not cut at two deviations, biases 0, norms 1.
"""

import torch
from torch import nn

from minift.models.randomness import generator

HEADS = {  # head -> the end of its architecture's name in config.json
    "causal_lm": "ForCausalLM",
    "masked_lm": "ForMaskedLM",
    "seq2seq_lm": "ForConditionalGeneration",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering",
    "none": "Model",
}
LANGUAGE_MODELS = ("causal_lm", "masked_lm", "seq2seq_lm")
CLASSIFIERS = ("sequence_classification", "token_classification")
STD = 0.02
MOST_LABELS = 2**16


def asked_head(head: str | None, num_labels: int | None) -> tuple[str | None, int | None]:
    """Regression is sequence classification with one output."""
    if head == "regression":
        if num_labels not in (None, 1):
            raise ValueError(f"head 'regression' has one output, and num_labels is {num_labels}")
        head, num_labels = "sequence_classification", 1
    if head is not None and head not in HEADS:
        raise ValueError(f"head {head!r} is not one of {', '.join([*HEADS, 'regression'])}")
    whole = isinstance(num_labels, int) and not isinstance(num_labels, bool)
    if num_labels is not None and not (whole and 1 <= num_labels <= MOST_LABELS):
        raise ValueError(f"num_labels is {num_labels!r}; it is a whole number from 1 to {MOST_LABELS}")
    return head, num_labels


def read_labels(config: dict) -> tuple[str, ...]:
    """The names of a classifier's outputs, by config.json's id2label or num_labels; two without either."""
    table = config.get("id2label")
    if table is None:
        count = config.get("num_labels", 2)
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_LABELS:
            raise ValueError(
                f"config.json: num_labels is {count!r}; it is a whole number from 1 to {MOST_LABELS}"
            )
        return default_labels(count)
    numbers = [str(i) for i in range(len(table))] if isinstance(table, dict) else []
    if not numbers or set(table) != set(numbers) or not all(isinstance(v, str) for v in table.values()):
        raise ValueError("config.json: id2label must give the numbers from 0 a name each")
    return tuple(table[i] for i in numbers)


def check_problem(config: dict, labels: tuple[str, ...]) -> None:
    """The loss that config.json names, where it names one, is the one of this many labels."""
    meant = "regression" if len(labels) == 1 else "single_label_classification"
    if config.get("problem_type") not in (None, meant):
        raise ValueError(
            f"config.json: problem_type {config['problem_type']!r} with {len(labels)} label(s) is not "
            f"supported; supported: {meant!r}"
        )


def default_labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def label_fields(labels: tuple[str, ...]) -> dict:
    """config.json's fields for labels."""
    if not labels:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(labels)},
        "label2id": {name: i for i, name in enumerate(labels)},
        "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
    }


def start_parameter(owner: nn.Module, attribute: str, path: str, dtype, device, seed: int) -> torch.Tensor:
    """The start of one parameter of a new head; it depends on (seed, path) alone."""
    shape = getattr(owner, attribute).shape
    if attribute == "bias":
        return torch.zeros(shape, dtype=dtype, device=device)
    if not isinstance(owner, nn.Linear):
        return torch.ones(shape, dtype=dtype, device=device)
    drawn = torch.empty(shape).normal_(0, STD, generator=generator(seed, path))
    return drawn.to(device, dtype)


def last_token(hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The hidden state of the last real token of each text: (B, T, D), mask (B, T) -> (B, D)."""
    if attention_mask is None:
        return hidden[:, -1]
    T = hidden.shape[1]
    places = torch.arange(T, device=hidden.device) * attention_mask[:, -T:].bool()  # (B, T)
    return hidden[torch.arange(len(hidden), device=hidden.device), places.argmax(dim=-1)]
