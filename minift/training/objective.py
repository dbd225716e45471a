"""The loss of a batch under each head, as a sum in nats and what it is the sum of.

    language models and token classifiers: -sum over supervised positions of log softmax(head(h))[label]
    sequence classifiers: -sum over rows of log softmax(logits)[label]; of one label sum (logit - label)^2
    answers: -sum over rows of (log softmax_t(start logits)[start] + log softmax_t(end logits)[end]) / 2

Logits become fp32 (fp64 for fp64) before any loss.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minift.data.collate import IGNORED
from minift.kernels.cross_entropy import ROWS, cross_entropy
from minift.models.interface import LanguageModel, stands_alone
from minift.models.layers import Linear

TARGETS = ("labels", "start_positions", "end_positions")  # all else in a batch goes into the model


class Objective(nn.Module):
    """batch -> (summed loss, its number of supervised positions, or of rows).

    The one module that is wrapped (DDP, FSDP, compile): calling parts of a wrapped model from the loop would
    give wrong gradients on several ranks without a word. A language model's logits are (N, V) for the N
    supervised positions, and in chunks, never (B, T, V).
    """

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        if self.model.adapters.by_rows():
            raise ValueError(
                "adapters are chosen by rows of the batch, and a loss is of one choice; leave adapters.rows "
                "first"
            )
        if self.model.head_kind not in LOSSES:
            raise ValueError(
                f"head {self.model.head_kind!r} has no loss; load the model with one of {', '.join(LOSSES)}"
            )
        wanted = TARGETS[1:] if self.model.head_kind == "question_answering" else TARGETS[:1]
        if missing := [name for name in wanted if name not in batch]:
            raise ValueError(f"the batch lacks {' and '.join(missing)}; it has {', '.join(batch)}")
        inputs = {name: tensor for name, tensor in batch.items() if name not in TARGETS}
        return LOSSES[self.model.head_kind](self.model, inputs, batch)


def next_token_loss(model, inputs, batch):
    """Position t predicts the label of t + 1."""
    hidden = model.backbone(**inputs)  # (B, T, D)
    return _positions_loss(model.head, hidden[:, :-1], batch["labels"][:, 1:])


def seq2seq_loss(model, inputs, batch):
    """The decoder reads the labels one place later and predicts them."""
    decoder_input_ids = model.shift_right(batch["labels"])  # (B, T)
    hidden = model.backbone(**inputs, decoder_input_ids=decoder_input_ids)  # (B, T, D)
    return _positions_loss(model.head, hidden, batch["labels"])


def token_loss(model, inputs, batch):
    """Each position predicts its own label: of masked tokens, or of tokens' classes."""
    return _positions_loss(model.head, model.backbone(**inputs), batch["labels"])


def label_loss(model, inputs, batch):
    return rows_loss(model(**inputs), batch["labels"]), len(batch["labels"])


def rows_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Logits (B, labels) of a sequence classifier, or (B, 1) of a regression, and labels (B,) -> the sum."""
    return nats(logits, labels) if logits.shape[1] > 1 else (_wide(logits)[:, 0] - labels).square().sum()


def answer_loss(model, inputs, batch):
    """Start and end are positions of the input, and no place of the padding, which would make the loss of a
    row depend on the others of its batch (transformers counts it)."""
    start, end = model(**inputs).unbind(-1)  # (B, T) each
    if (mask := inputs.get("attention_mask")) is not None:
        start, end = (logits.masked_fill(mask == 0, float("-inf")) for logits in (start, end))
    return (nats(start, batch["start_positions"]) + nats(end, batch["end_positions"])) / 2, len(start)


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy: logits (N, classes), labels (N,)."""
    return F.cross_entropy(_wide(logits), labels, reduction="sum")


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


LOSSES = {
    "causal_lm": next_token_loss,
    "seq2seq_lm": seq2seq_loss,
    "masked_lm": token_loss,
    "token_classification": token_loss,
    "sequence_classification": label_loss,
    "question_answering": answer_loss,
}


def _positions_loss(head: nn.Module, hidden, labels):
    """The head on the positions whose label is not IGNORED: hidden (B, T, D), labels (B, T)."""
    supervised = labels != IGNORED  # (B, T)
    hidden, targets = hidden[supervised], labels[supervised]  # (N, D), (N,)
    if is_plain(head, hidden.dtype):
        return cross_entropy(hidden, head.weight, targets), len(targets)

    def loss(hidden, targets):
        return nats(head(hidden), targets)

    chunks = list(zip(hidden.split(ROWS), targets.split(ROWS), strict=True))
    if len(chunks) < 2 or not torch.is_grad_enabled():
        losses = [loss(h, y) for h, y in chunks]
    else:  # recompute logits in backward
        losses = [checkpoint(loss, h, y, use_reentrant=False) for h, y in chunks]
    return torch.stack(losses).sum(), len(targets)


def is_plain(head: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a head is its matrix and nothing else, in the dtype of hidden; dW in fp16 may overflow."""
    return (
        dtype != torch.float16
        and type(head) in (nn.Linear, Linear)
        and head.bias is None
        and stands_alone(head)
        and head.weight.is_contiguous()
        and head.weight.dtype == dtype
    )
