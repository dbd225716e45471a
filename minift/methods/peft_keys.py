"""Tensors of an adapter file, under the keys that we write."""

import torch

from minift.models.interface import dense_weight
from minift.models.wrappers import get_module, innermost

PREFIX = "base_model.model."
SLOT_PREFIX = "base_model."  # beside virtual tokens
ADAPTER_PARTS = (
    "lora_A",
    "lora_B",
    "lora_E",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)


def our_keys(model, stored: dict, config: dict, where) -> dict:
    """The file's tensors under the keys that we write, in fp32.

    Adapter names that files may hold go, and so do embeddings that PEFT saves beside their branch, if they
    are the base's; pruned triplets come back as zeros.
    """
    found = {}
    for key, tensor in stored.items():
        head, dot, _ = key.removesuffix(".weight").rpartition(".")
        kind = head.rpartition(".")[2]
        if kind in ADAPTER_PARTS and dot:  # <path>.lora_A.<adapter name>
            key = f"{head}.weight" if key.endswith(".weight") else head
        if key.endswith("lora_magnitude_vector.weight"):
            key = key.removesuffix(".weight")
        if key.endswith(".base_layer.weight") and key.startswith(PREFIX):
            _check_copy(model, key.removeprefix(PREFIX).removesuffix(".base_layer.weight"), tensor, where)
            continue
        if key in found:
            raise ValueError(f"{where} holds {key} twice, under two adapter names")
        if not tensor.is_floating_point():
            raise ValueError(f"{where}: {key} is {tensor.dtype}; adapters are floating-point")
        found[key] = tensor.float()
    pattern = config.get("rank_pattern") if config.get("peft_type") == "ADALORA" else None
    for key, kept in (pattern or {}).items():
        _restore_pruned(found, key.removesuffix(".lora_E"), kept, where)
    return found


def _check_copy(model, path: str, tensor: torch.Tensor, where) -> None:
    try:
        weight = dense_weight(innermost(get_module(model, path)))
    except (AttributeError, TypeError):
        raise ValueError(f"{where}: {path}.base_layer.weight belongs to no layer of this model") from None
    if weight.shape != tensor.shape or not torch.equal(weight, tensor.to(weight)):
        raise ValueError(
            f"{where} holds a base weight for {path} that is not this model's (a resized or trained "
            "embedding); load the base that it belongs to"
        )


def _restore_pruned(found: dict, path: str, kept, where) -> None:
    """PEFT stores the triplets that `kept` (r booleans) names; put them back at their places."""
    if not isinstance(kept, list) or not all(isinstance(k, bool) for k in kept):
        raise ValueError(f"{where}: rank_pattern of {path} is no list of booleans")
    rows = torch.tensor(kept).nonzero().flatten()
    for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = f"{PREFIX}{path}.{part}"
        if key not in found or found[key].ndim != 2 or found[key].shape[dim] != len(rows):
            raise ValueError(f"{where}: {key} does not hold the {len(rows)} triplets that rank_pattern names")
        shape = list(found[key].shape)
        shape[dim] = len(kept)
        found[key] = torch.zeros(shape).index_copy(dim, rows, found[key])
