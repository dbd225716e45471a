"""`minift merge`: fold an adapter into its base, with the error that it makes, in the weights and the
logits."""

import torch

from minift.load import load_model, load_tokenizer, save_model
from minift.methods import merge as fold
from minift.methods.files import load_adapter
from minift.quant import Quantization
from minift.reports.quantization import read_text

PROBE = 256  # tokens on which the logits are compared


def merge(
    source: str,
    adapter: str,
    output: str,
    quantize: Quantization | None = None,
    mode: str = "dequantized",
    dtype: str = "bfloat16",
    text: str = "",
) -> dict[str, float]:
    """Load, merge, print the errors, save to `output`; `mode` as in `minift.merge`."""
    model = load_model(source, dtype, quantize=quantize)
    load_adapter(model, adapter)
    original = load_model(source, dtype) if mode == "original" else None
    tokens = min(PROBE, model.config.max_position_embeddings)
    ids = torch.tensor([load_tokenizer(source).encode(read_text(text)[: 16 * tokens])[:tokens]])
    with torch.inference_mode():
        before = model(ids)[0].float()  # (T, V)
    errors = fold(model, mode=mode, original=original)
    with torch.inference_mode():
        after = model(ids)[0].float()
    width = max(map(len, errors))
    print(f"{'layer':<{width}}  largest error")
    for path, error in errors.items():
        print(f"{path:<{width}}  {error:.3e}")
    print(f"{mode}: {logit_error(before, after)}")
    save_model(model, output)
    print(f"the merged model is in {output}")
    return errors


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
