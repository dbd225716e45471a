"""What reports run a model on: the first tokens of a text, and the logits there."""

from pathlib import Path
from pydoc_data import topics

import torch

from minift.data.tokenizer import Tokenizer
from minift.models.interface import LanguageModel


def read_text(path: str = "") -> str:
    """A text file, or the Python language reference that comes with Python."""
    if not path:
        return "\n".join(topics.topics[name] for name in sorted(topics.topics))
    if not Path(path).is_file():
        raise ValueError(f"text {path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text {path} is not UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"text {path} is empty")
    return text


def probe(model: LanguageModel, tokenizer: Tokenizer, text: str, tokens: int) -> torch.Tensor:
    """ids (1, T) of a file's or the default text's first tokens; an encoder-decoder's end with EOS."""
    ids = tokenizer.encode(read_text(text)[: 16 * tokens])[:tokens]
    if model.is_encoder_decoder:
        ids[-1] = next(iter(tokenizer.eos_ids), ids[-1])
    return torch.tensor([ids])


@torch.inference_mode()
def logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    """Of the one text: (T, V), or (labels,); a decoder behind an encoder reads the same text."""
    decodes = model.is_encoder_decoder and model.head_kind in ("seq2seq_lm", "none")
    more = {"decoder_input_ids": model.shift_right(ids)} if decodes else {}
    return model(ids, **more)[0].float()
