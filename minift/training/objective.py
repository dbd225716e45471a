"""The loss of a batch: backbone, head on the supervised positions only, summed cross-entropy."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minift.data.collate import IGNORED
from minift.kernels.cross_entropy import ROWS, cross_entropy
from minift.models.interface import LanguageModel, stands_alone


def is_plain(head: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a head is its matrix and nothing else, in the dtype of hidden; dW in fp16 may overflow."""
    return (
        dtype != torch.float16
        and type(head) is nn.Linear
        and head.bias is None
        and stands_alone(head)
        and head.weight.is_contiguous()
        and head.weight.dtype == dtype
    )


class Objective(nn.Module):
    """(-sum over supervised positions of log softmax(head(h_t))[token_{t+1}] in nats, their number).

    The one module that is wrapped (DDP, FSDP, compile): calling parts of a wrapped model from the loop would
    give wrong gradients on several ranks without a word. Logits are (N, V) for the N supervised positions,
    in fp32 (fp64 for fp64) and in chunks, never (B, T, V).
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
        hidden = self.model.backbone(batch["input_ids"], attention_mask=batch["attention_mask"])  # (B, T, D)
        targets = batch["labels"][:, 1:]  # position t predicts token t + 1
        supervised = targets != IGNORED  # (B, T - 1)
        hidden, targets = hidden[:, :-1][supervised], targets[supervised]  # (N, D), (N,)
        head = self.model.head
        if is_plain(head, hidden.dtype):
            return cross_entropy(hidden, head.weight, targets), len(targets)
        if len(targets) <= ROWS or not torch.is_grad_enabled():
            chunks = [self._nll(h, y) for h, y in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)]
        else:  # recompute logits in backward
            chunks = [
                checkpoint(self._nll, h, y, use_reentrant=False)
                for h, y in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
            ]
        return torch.stack(chunks).sum(), len(targets)

    def _nll(self, hidden, targets):
        logits = self.model.head(hidden)  # (N, V)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(wide), targets, reduction="sum")
