"""What an adapter was trained on: the fingerprint of the base, the hash of the chat template."""

import hashlib

import torch

from minift.models.interface import LanguageModel
from minift.models.wrappers import base_parameters

NO_TEMPLATE = "none"


def describe_base(model: LanguageModel) -> str:
    """Source, dtype and quantization of a base, in words."""
    recipes = [
        f"{r.format} in blocks of {r.block_size}{', double' * r.double_quant}" for r in model.quantization
    ]
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{model.source or 'a model made in Python'} in {dtype}, {' and '.join(recipes) or 'not quantized'}"
    )


def fingerprint(model: LanguageModel) -> str:
    """SHA-256 over the base's parameter names and shapes and, as bf16, the first and last row of each.

    Of quantized parameters, the first and last 1024 bytes. The same for a base held in fp32 or bf16; wrappers
    and adapters are left out.
    """
    digest = hashlib.sha256()
    base = base_parameters(model)
    for name, p in sorted(base.items()):
        digest.update(f"{name}:{tuple(p.shape)}".encode())
        if p.dtype == torch.uint8 and not p.is_meta:
            digest.update(torch.cat((p.detach()[:1024], p.detach()[-1024:])).cpu().numpy().tobytes())
        elif not p.is_meta:
            ends = torch.stack((p.detach()[0], p.detach()[-1])).to(torch.bfloat16).cpu()
            digest.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def template_hash(template: str) -> str:
    """SHA-256 of a chat template's text; "none" stays itself."""
    return template if template == NO_TEMPLATE else hashlib.sha256(template.encode()).hexdigest()
