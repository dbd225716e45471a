"""`minift merge`: fold an adapter in, with the error that it makes in weights and logits."""

import torch

from minift.load import fresh_folder, load_model, load_tokenizer, save_model, save_tokenizer
from minift.methods import merge as fold
from minift.methods.files import load_adapter, trained_head
from minift.models.wrappers import base_layers, innermost
from minift.quant import Quantization, bnb
from minift.reports.probe import logits, probe

PROBE = 256  # tokens on which the logits are compared


def merge(
    source: str,
    adapter: str,
    output: str,
    quantize: Quantization | None = None,
    mode: str = "dequantized",
    dtype: str = "bfloat16",
    text: str = "",
    check_base: bool = True,
) -> dict[str, float]:
    """Load, merge, print the errors, save to `output`; `mode` as in `minift.merge`."""
    folder = fresh_folder(output)
    head = trained_head(adapter)
    model, tokenizer = load_model(source, dtype, quantize=quantize, **head), load_tokenizer(source)
    load_adapter(model, adapter, check_base=check_base)
    _check_storable(model, mode)
    original = load_model(source, dtype, **head) if mode == "original" else None
    ids = probe(model, tokenizer, text, min(PROBE, model.dims.context))
    before = logits(model, ids)
    errors = fold(model, mode=mode, original=original)
    after = logits(model, ids)
    width = max(map(len, errors))
    print(f"{'layer':<{width}}  largest error")
    for path, error in errors.items():
        print(f"{path:<{width}}  {error:.3e}")
    print(f"{mode}: {logit_error(before.view(-1, before.shape[-1]), after.view(-1, after.shape[-1]))}")
    save_model(model, folder)
    save_tokenizer(tokenizer, folder)
    print(f"the merged model is in {output}")
    return errors


def _check_storable(model, mode: str) -> None:
    """Refuse what could not be saved after the merge, before the work."""
    [adapter] = model.adapters.values()
    for path, layer in base_layers(model).items():
        layout = getattr(innermost(layer), "layout", None)
        stays = layout and (mode == "requantized" or path not in adapter.modules)
        if stays and layout.format.name not in bnb.STORABLE:
            raise ValueError(
                f"{path} would stay {layout.format.name}, and a saved model holds "
                f"{' or '.join(bnb.STORABLE)}; quantize only the layers that the adapter covers, and merge "
                "them with mode dequantized"
            )


def logit_error(before: torch.Tensor, after: torch.Tensor) -> str:
    """How two (T, V) logits differ, in words."""
    divergence = torch.nn.functional.kl_div(
        after.log_softmax(-1), before.log_softmax(-1), reduction="batchmean", log_target=True
    ).item()
    other = (before.argmax(-1) != after.argmax(-1)).sum().item()
    return (
        f"logits of {len(before)} tokens differ by at most {(before - after).abs().max().item():.3e}, "
        f"KL divergence {divergence:.3e} nats a token, another best token at {other} of {len(before)}"
    )
