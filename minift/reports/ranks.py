"""`minift rank`: the ranks of an adapter folder, shown, advised or changed, without loading the base.

Reads adapter_config.json and adapter_model.safetensors as PEFT lays them out, strictly: every tensor must be
a factor of the rank that the config says, or belong to its modules_to_save. What is written keeps all other
facts of the file (the base's fingerprint, the template's hash) and says the new ranks and scalings.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from minift.load import fresh_folder
from minift.methods.factors import Factors, alpha_for, check_finite, svd, with_ranks
from minift.methods.files import CONFIG, WEIGHTS
from minift.methods.fingerprint import fact
from minift.methods.lora import LoRA, first_fit
from minift.methods.peft_format import from_config
from minift.methods.peft_keys import PREFIX
from minift.methods.plan import aligned
from minift.methods.rank import advised, edited
from minift.models.disk import write_text
from minift.models.json_file import read_json
from minift.models.safetensors_file import read_tensors, write_safetensors

VERBS = ("show", "advise", "set", "shrink", "grow")
# a branch's key after the prefix: path, factor, the adapter name that older files kept
BRANCH = re.compile(r"(.+)\.(?:(lora_[AB])(?:\.[\w-]+)?\.weight|(lora_embedding_[AB])(?:\.[\w-]+)?)")


@dataclass(frozen=True)
class Stored:
    """A LoRA adapter as its folder holds it."""

    config: dict
    facts: dict[str, str]  # the metadata of the safetensors file
    method: LoRA
    factors: dict[str, Factors]  # by path; of an embedding, (V, D) counts as (out, in)
    embeddings: set[str]
    copies: dict[str, str]  # a tied head, whose factors are its embedding's -> the embedding
    rest: dict[str, torch.Tensor]  # modules_to_save, by the file's keys


def rank(verb: str, folder: str, r=None, energy: float | None = None, output: str = "", seed: int = 0):
    """Print ranks and errors; `set`, `shrink` and `grow` write the adapter at its new ranks to `output`.

    `r` is one rank or rule -> rank; `energy` takes the ranks that `advise` gives in its place. Returns the
    rank of each path.
    """
    _check(verb, r, energy, output)
    changes = verb in ("set", "shrink", "grow")
    target = fresh_folder(output) if changes else None
    stored = read(Path(folder))
    if verb == "show":
        print(shown(stored))
        return {path: factors.r for path, factors in stored.factors.items()}
    if not changes:
        advice = advised(stored.factors, 0.99 if energy is None else energy)
        print(advice)
        return advice.ranks
    wanted = advised(stored.factors, energy) if r is None else r
    new, ranks = edited(stored.factors, wanted, seed=seed)
    for row in ranks.rows:
        if row.after > row.before if verb == "shrink" else row.after < row.before and verb == "grow":
            raise ValueError(
                f"{verb}: {row.path} has rank {row.before}, and {row.after} is "
                f"{'above' if verb == 'shrink' else 'below'} it; say minift rank set"
            )
    write(stored, new, target)
    print(ranks)
    print(f"the adapter is in {output}")
    return ranks.ranks


def shown(stored: Stored) -> str:
    """Of each layer rank, scaling, Frobenius norm of the delta, its largest and smallest singular value."""
    rows = [("module", "r", "alpha", "scaling", "norm", "largest", "smallest")]
    for path, factors in stored.factors.items():
        S = factors.scaling * svd(factors)[1]
        numbers = (alpha_for(stored.method, factors), factors.scaling)
        sizes = (S.norm().item(), S[0].item(), S[-1].item())
        rows.append((path, str(factors.r), *(f"{x:g}" for x in numbers), *(f"{x:.4e}" for x in sizes)))
    parameters = sum(f.r * sum(f.shape) for f in stored.factors.values())
    return f"{aligned(rows, right=range(1, 7))}\nparameters: {parameters:,}"


def read(folder: Path) -> Stored:
    """A LoRA adapter from its folder; anything that does not fit is an error that names it."""
    config = read_json(folder / CONFIG, "an adapter folder holds it beside " + WEIGHTS)
    method = from_config(config, folder / CONFIG)
    if type(method) is not LoRA:
        raise ValueError(f"{folder} holds a {method.name} adapter; minift rank edits lora")
    tensors, facts = read_tensors(folder / WEIGHTS)
    branches, rest = {}, {}
    for key, tensor in tensors.items():
        path, part = _branch(key, method, folder / WEIGHTS)
        if not tensor.is_floating_point():
            raise ValueError(f"{folder / WEIGHTS}: {key} is {tensor.dtype}; adapters are floating-point")
        if part is None:
            rest[key] = tensor
        elif part in branches.setdefault(path, {}):
            raise ValueError(f"{folder / WEIGHTS} holds {path}.{part} twice, under two adapter names")
        else:
            branches[path][part] = tensor.float()
    factors = {path: _factors(path, found, method, folder) for path, found in branches.items()}
    if not factors:
        raise ValueError(f"{folder / WEIGHTS} holds no factors")
    check_finite(factors)
    ledger = _ledger(facts, folder / WEIGHTS)
    for path, f in factors.items():
        # products in fp64, each rounded once
        if not abs(ledger.get(path, f.scaling) - f.scaling) <= 1e-12 * f.scaling:
            raise ValueError(
                f"{folder}: {CONFIG} says scaling {f.scaling!r} for {path}, {WEIGHTS} {ledger[path]!r}; the "
                "two files belong to different adapters"
            )
    embeddings = {path for path, found in branches.items() if "lora_embedding_A" in found}
    copies = _copies(factors, embeddings, folder) if method.tied == "both" else {}
    factors = {path: f for path, f in factors.items() if path not in copies}
    return Stored(config, facts, method, factors, embeddings, copies, rest)


def _copies(factors: dict[str, Factors], embeddings: set[str], folder: Path) -> dict[str, str]:
    """Head -> embedding: under ensure_weight_tying PEFT stores the branch of both under both."""
    found = {}
    for path in factors.keys() - embeddings:
        for e in embeddings:
            if torch.equal(factors[path].A, factors[e].A) and torch.equal(factors[path].B, factors[e].B):
                found[path] = e
    if embeddings and not found:
        raise ValueError(f"{folder}: ensure_weight_tying, and no other branch is that of {min(embeddings)}")
    return found


def _branch(key: str, method: LoRA, where: Path) -> tuple[str, str | None]:
    """(path, factor) of a key, or no factor where it belongs to modules_to_save or copies the base."""
    path = key.removeprefix(PREFIX)
    found = BRANCH.fullmatch(path)
    if found and path != key:
        return found[1], found[2] or found[3]
    module = path.rpartition(".")[0]
    saved = any(f".{rule}." in f".{module}." for rule in method.modules_to_save)
    if path == key or not (saved or path.endswith(".base_layer.weight")):
        raise ValueError(
            f"{where} has an unexpected tensor, {key}; a lora file holds factors lora_A and lora_B"
        )
    return path, None


def _factors(path: str, found: dict[str, torch.Tensor], method: LoRA, folder: Path) -> Factors:
    """The two factors of a path, checked against the config."""
    pairs = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
    if tuple(sorted(found)) not in pairs or any(t.ndim != 2 or not t.numel() for t in found.values()):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(found.items()))
        raise ValueError(f"{folder / WEIGHTS} holds {shapes} of {path}, which is no pair of matrices")
    A, B = (found[name] for name in sorted(found))
    if "lora_embedding_A" in found:
        A, B = B.t(), A.t()
    r = method.rank_pattern.get(first_fit(method.rank_pattern, path), method.r)
    alpha = method.alpha_pattern.get(first_fit(method.alpha_pattern, path), method.alpha)
    if len(A) != r or B.shape[1] != r:
        raise ValueError(
            f"{folder}: {path} has rank {len(A)} and {B.shape[1]} in {WEIGHTS}, {CONFIG} says {r}"
        )
    return Factors(A, B, method.scale(r, alpha))


def _ledger(facts: dict[str, str], where: Path) -> dict[str, float]:
    """Path -> scaling, where the file says it."""
    ledger = fact(facts, "minift.scaling", where)
    if any(type(s) not in (int, float) for s in ledger.values()):
        raise ValueError(f"{where}: minift.scaling in the metadata is no table of scalings")
    return ledger


def write(stored: Stored, new: dict[str, Factors], target: Path) -> None:
    """The folder with other factors, complete or absent."""
    method = with_ranks(stored.method, new)
    tensors, ledger = dict(stored.rest), json.loads(stored.facts.get("minift.scaling", "{}"))
    for path, factors in new.items():
        ledger[path] = method.scale(factors.r, alpha_for(method, factors))
        f = factors.at(ledger[path])
        if path in stored.embeddings:
            pair = {"lora_embedding_A": f.B.t(), "lora_embedding_B": f.A.t()}
        else:
            pair = {"lora_A.weight": f.A, "lora_B.weight": f.B}
        tensors |= {f"{PREFIX}{path}.{key}": tensor for key, tensor in pair.items()}
        for head in (h for h, embedding in stored.copies.items() if embedding == path):
            ledger[head] = ledger[path]
            tensors |= {
                f"{PREFIX}{head}.lora_A.weight": f.A.clone(),
                f"{PREFIX}{head}.lora_B.weight": f.B.clone(),
            }
    facts = {"format": "pt", **stored.facts, "minift.scaling": json.dumps(ledger)}
    config = {**stored.config, "r": method.r, "lora_alpha": method.alpha, "init_lora_weights": True}
    config |= {"rank_pattern": method.rank_pattern, "alpha_pattern": method.alpha_pattern}
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}-{os.getpid()}"
    work.mkdir()
    try:
        write_safetensors(work / WEIGHTS, tensors, facts)
        write_text(work / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(verb: str, r, energy, output: str) -> None:
    if verb not in VERBS:
        raise ValueError(f"minift rank {verb} is not known; known: {', '.join(VERBS)}")
    if verb in ("show", "advise"):
        if r is not None or output or (verb == "show" and energy is not None):
            raise ValueError(
                f"minift rank {verb} changes nothing; leave out r, output and what it does not use"
            )
        return
    if not output:
        raise ValueError(f"minift rank {verb} needs an output, a new folder for the adapter")
    if (r is None) == (energy is None):
        raise ValueError(f"minift rank {verb} needs r or energy, one of the two")


def parse_ranks(words: list[str] | None) -> int | dict[str, int] | None:
    """`4` as one rank for all layers, or `q_proj=4` and more as rule -> rank."""
    if words is None:
        return None
    pairs = [word.rpartition("=") for word in words]
    whole = len(words) == 1 and words[0].isdecimal()
    if not whole and not all(rule and rank.isdecimal() for rule, _, rank in pairs):
        raise ValueError(f"--r {' '.join(words)} is neither one rank, as 4, nor ranks by rule, as q_proj=4")
    if len({rule for rule, _, _ in pairs}) < len(pairs):
        raise ValueError(f"--r {' '.join(words)} names a rule twice; leave one out")
    return int(words[0]) if whole else {rule: int(rank) for rule, _, rank in pairs}
