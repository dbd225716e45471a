"""What an adapter was trained on, as its file's metadata say it: base, other adapters, template, scalings."""

import hashlib

import torch

from minift.models.interface import LanguageModel
from minift.models.json_file import parse_json
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

    What is new in the head is left out: the adapter has its own.

    Of quantized parameters, the first and last 1024 bytes. The same for a base held in fp32 or bf16; wrappers
    and adapters are left out.
    """
    digest = hashlib.sha256()
    base = base_parameters(model)
    for name, p in sorted(base.items()):
        if model.is_new(name):
            continue
        digest.update(f"{name}:{tuple(p.shape)}".encode())
        if p.dtype == torch.uint8 and not p.is_meta:
            digest.update(torch.cat((p.detach()[:1024], p.detach()[-1024:])).cpu().numpy().tobytes())
        elif not p.is_meta:
            ends = torch.stack((p.detach()[0], p.detach()[-1])).to(torch.bfloat16).cpu()
            digest.update(ends.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapters_beneath(model: LanguageModel, name: str) -> dict[str, str]:
    """Name -> SHA-256 of the tensors of each active adapter that `name` is wrapped around, or of all."""
    found, order = {}, list(model.adapters)
    for other in model.adapters.active():
        if name not in order or order.index(other) < order.index(name):
            digest = hashlib.sha256()
            for path, part in model.adapters[other].modules.items():
                for key, tensor in sorted(part.state().items()):
                    digest.update(f"{path}.{key}".encode())
                    digest.update(tensor.detach().float().cpu().numpy().tobytes())
            found[other] = digest.hexdigest()
    return found


def template_hash(template: str) -> str:
    """SHA-256 of a chat template's text; "none" stays itself."""
    return template if template == NO_TEMPLATE else hashlib.sha256(template.encode()).hexdigest()


def fact(facts: dict[str, str], key: str, where) -> dict:
    """A table in the metadata of a file, empty where there is none."""
    try:
        table = parse_json(facts.get(key, "{}").encode())
    except ValueError:
        table = None
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {key} in the metadata is no table: {facts[key][:40]!r}")
    return table


def check_scaling(adapter, facts: dict, where) -> None:
    """The scale ledger: what config and patterns give must be what the adapter was trained with."""
    ledger = fact(facts, "minift.scaling", where)
    for site in adapter.plan.sites:
        was = ledger.get(site.path) if ledger else site.scaling
        number = type(was) in (int, float)
        # products in fp64, each rounded once
        if site.scaling is not None and not (number and abs(was - site.scaling) <= 1e-12 * site.scaling):
            raise ValueError(
                f"{where.parent}: adapter_config.json says scaling {site.scaling!r} for {site.path}, "
                f"{where.name} {was!r}; the two files belong to different adapters"
            )


def check_facts(model, facts: dict, where, check_base: bool, template: str | None) -> None:
    if check_base and facts.get("minift.base_fingerprint", fingerprint(model)) != fingerprint(model):
        raise ValueError(
            f"{where.parent} was trained on another base than this one (fingerprints differ): on "
            f"{facts.get('minift.base', 'one that the file does not describe')}, not on "
            f"{describe_base(model)}; load that base, or do not check (check_base=False in Python, "
            "--any-base)"
        )
    beneath = fact(facts, "minift.beneath", where)
    missing = {str(digest) for digest in beneath.values()} - set(adapters_beneath(model, "").values())
    if check_base and missing:
        names = ", ".join(sorted(n for n, digest in beneath.items() if str(digest) in missing))
        raise ValueError(
            f"{where.parent} was trained over another adapter ({names}) that is not active here; load that "
            "first, or do not check (check_base=False in Python, --any-base)"
        )
    labels = fact(facts, "minift.head", where).get("labels")
    if check_base and labels is not None and labels != list(model.labels):
        raise ValueError(
            f"{where.parent} was trained with the labels {labels}, and the model has {list(model.labels)}; "
            "load it with labels=..., or do not check (check_base=False in Python, --any-base)"
        )
    known = facts.get("minift.template")
    if template is not None and known not in (None, template_hash(template)):
        raise ValueError(
            f"{where.parent} was trained with {'no' if known == NO_TEMPLATE else 'another'} chat template "
            f"({known[:12]}, here {template_hash(template)[:12]}); use that one, or do not check "
            "(template=None in Python, --any-template)"
        )
