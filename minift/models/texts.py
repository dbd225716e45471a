"""A batch of texts that grow by a token a step, and what the model has read of them.

A decoder's texts are the prompts, padded on the left to one length. Those of an encoder-decoder begin with
`decoder_start_id`, and the encoder reads the prompts, padded on the right.
"""

import torch

from minift.models.interface import LanguageModel


class Texts:
    """ids (B, capacity), of which `length` columns are filled; new tokens begin at column `start`."""

    def __init__(
        self,
        model: LanguageModel,
        prompts: list[list[int]],
        max_new_tokens: int,
        pad_id: int = 0,
        use_cache: bool = True,
    ):
        self.model, self.encoded = model, {}
        if model.is_encoder_decoder:
            ids, mask = pad(prompts, pad_id, left=False)
            self.encoded = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            prompts = [[model.decoder_start_id]] * len(prompts)
        ids, mask = pad(prompts, pad_id, left=True)
        B, self.start = ids.shape
        capacity = self.start + max_new_tokens
        self.ids = torch.full((B, capacity), pad_id, device=model.device)
        self.ids[:, : self.start] = ids
        self.mask = None  # (B, capacity); without padding there is none
        if not mask.all():
            self.mask = torch.ones(B, capacity, dtype=torch.long, device=model.device)
            self.mask[:, : self.start] = mask
        self.length, self.read = self.start, 0  # columns filled; columns that the cache holds
        self.cache = model.new_cache(B, capacity) if use_cache else None

    def logits(self) -> torch.Tensor:
        """Scores of each text's next token: (B, V) fp32."""
        new = self.ids[:, self.read : self.length]  # (B, T)
        if self.model.is_encoder_decoder:
            hidden = self.model.backbone(**self.encoded, decoder_input_ids=new, cache=self.cache)
        else:
            mask = None if self.mask is None else self.mask[:, : self.length]
            hidden = self.model.backbone(new, attention_mask=mask, cache=self.cache)
        if self.cache is not None:
            self.read = self.length
        return self.model.head(hidden[:, -1]).float()

    def seen(self) -> torch.Tensor:
        """The tokens of each text: (B, length); the last one stands in the place of padding."""
        ids = self.ids[:, : self.length]
        return ids if self.mask is None else torch.where(self.mask[:, : self.length] > 0, ids, ids[:, -1:])

    def append(self, tokens: torch.Tensor) -> None:
        """A token (B,) for each text."""
        self.ids[:, self.length] = tokens
        self.length += 1

    def reorder(self, rows: torch.Tensor) -> None:
        """Text i becomes what text rows[i] was; there may be more texts after it than before."""
        self.ids = self.ids[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.encoded = {name: tensor[rows] for name, tensor in self.encoded.items()}
        if self.cache is not None:
            self.cache.reorder(rows)


def pad(texts: list[list[int]], pad_id: int, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and mask (B, T), 1 on real tokens."""
    T = max(map(len, texts))
    ids, mask = torch.full((len(texts), T), pad_id), torch.zeros(len(texts), T, dtype=torch.long)
    for row, text in enumerate(texts):
        place = slice(T - len(text), T) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask
