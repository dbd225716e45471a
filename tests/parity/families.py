"""What every family's parity test does: a random transformers model, ours from its folder, and both compared.

`peer` is a transformers model everywhere. Its parameters are random and large, so that every part of the
forward matters; id 0 is padding, and a real token is never 0.
"""

import itertools
import json

import pytest
import torch

import minift
from minift.models.weights import as_stored

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5  # of the largest number compared: some 80 roundings of fp32, for sums of tens of products
PADDINGS = ("none", "left", "right", "hole")
GRID = [(1, 1, "none"), *itertools.product((1, 3), (7,), PADDINGS)]  # texts, length, padding


def random_peer(architecture: str, seed: int = 0, **fields):
    """A transformers model of that class in fp32; `fields` are those of its config."""
    kind = getattr(transformers, architecture)
    peer = kind(kind.config_class(**{"pad_token_id": 0, **fields}))
    peer.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            drawn = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * drawn if p.dim() == 1 and name.endswith("weight") else 0.2 * drawn)
    return peer.float().eval()


def ours_of(peer, folder, max_shard_size="1GB", **options):
    """Our model of the folder that the peer writes."""
    peer.save_pretrained(folder, max_shard_size=max_shard_size)
    return minift.load_model(folder, **options)


def change_config(folder, change) -> None:
    """Rewrite config.json by a function from its fields to new ones."""
    path = folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def texts(vocab: int, B: int, T: int, padding: str, seed: int = 0):
    """Random ids and their mask, both (B, T); the first of several texts is not padded."""
    ids = torch.randint(1, vocab, (B, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(B, T, dtype=torch.long)
    for row in range(B) if B == 1 else range(1, B):
        gap = min(T - 1, 2 * row + 2)
        start = {"none": T, "left": 0, "right": T - gap, "hole": 2}[padding]
        mask[row, start : min(T - (padding == "hole"), start + gap)] = 0
    return ids * mask, mask


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def output_of(found):
    """The tensor of transformers' answer that ours is: logits, start and end of an answer, hidden states."""
    if "start_logits" in found:
        return torch.stack((found.start_logits, found.end_logits), dim=-1)  # (B, T, 2)
    return found.logits if "logits" in found else found.last_hidden_state


def largest(tensors) -> float:
    return max(float(t.detach().abs().max()) for t in tensors)


def compare(ours, peer, ids, mask, gradients=True, theirs=None, **more) -> None:
    """Outputs on real tokens, and gradients of every parameter under a random cotangent.

    `more` goes to both, `theirs` to the peer alone, as position_ids where it would not follow the mask.
    """
    a = ours(ids, attention_mask=mask, **more)
    b = output_of(peer(ids, attention_mask=mask, **more, **(theirs or {})))
    assert a.shape == b.shape
    decoded = more.get("decoder_attention_mask") if "decoder_input_ids" in more else mask
    real = slice(None) if a.dim() == 2 or decoded is None else decoded.bool()  # a text, or real tokens
    assert (a[real] - b[real]).abs().max() <= TOLERANCE * largest([b[real]]), (ids.shape, mask)
    if not gradients:
        return
    ours.zero_grad(), peer.zero_grad()
    cotangent = torch.randn(b[real].shape, generator=torch.Generator().manual_seed(1))
    for output in (a, b):
        (output[real] * cotangent).sum().backward()
    got = as_stored(ours, {name: _gradient(p) for name, p in ours.named_parameters()})
    want = {name: _gradient(p) for name, p in peer.named_parameters()}
    assert got.keys() == want.keys()
    floor = largest(want.values()) / 100  # a bias of keys has gradient 0: all of it is rounding
    for name, gradient in want.items():
        assert got[name].shape == gradient.shape, name
        assert (got[name] - gradient).abs().max() <= TOLERANCE * max(largest([gradient]), floor), name


def _gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def compare_everywhere(ours, peer, more=None, positions=False) -> None:
    """`compare` over batches, lengths and paddings; more(B, T, mask) gives what a family takes besides."""
    vocab = ours.dims.vocab
    for seed, (B, T, padding) in enumerate(GRID):
        ids, mask = texts(vocab, B, T, padding, seed)
        theirs = {"position_ids": positions_of(mask)} if positions else {}
        compare(ours, peer, ids, mask, theirs=theirs, **(more(B, T, mask) if more else {}))


def compare_with_cache(ours, peer, pieces=(3, 1, 1, 4), padding="left") -> None:
    """A decoder that reads in pieces through its cache beside a peer that reads all at once."""
    T, at, got = sum(pieces), 0, []
    ids, mask = texts(ours.dims.vocab, 3, T, padding)
    cache = ours.new_cache(3, T)
    with torch.no_grad():
        for n in pieces:
            got.append(ours(ids[:, at : at + n], attention_mask=mask[:, : at + n], cache=cache))
            at += n
        want = output_of(peer(ids, attention_mask=mask, position_ids=positions_of(mask)))[mask.bool()]
    assert (torch.cat(got, dim=1)[mask.bool()] - want).abs().max() <= TOLERANCE * largest([want])


def theirs_of(ours, folder):
    """The transformers model of the folder that we write; it finds each of its tensors there and no other."""
    minift.save_model(ours, folder)
    kind = getattr(transformers, ours.architecture)
    peer, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return peer


def check_folders(peer, folder, shard="10KB", unimportant=(), **options) -> None:
    """The peer's shards load in ours, ours as one file in theirs, with the same bits and the same config.

    `unimportant` are fields of the config that may differ.
    """
    ours = ours_of(peer, folder / "theirs", shard, **options)
    assert len(list((folder / "theirs").glob("*.safetensors"))) > 1
    assert ours.architecture == type(peer).__name__ == ours.to_hf()["architectures"][0]
    back = theirs_of(ours, folder / "ours")
    state = back.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in peer.state_dict().items())
    written = [{k: v for k, v in p.config.to_dict().items() if k not in SAY_NOTHING} for p in (peer, back)]
    different = {key for key in {*written[0], *written[1]} if written[0].get(key) != written[1].get(key)}
    assert different <= set(unimportant), different


SAY_NOTHING = ("_name_or_path", "architectures", "dtype", "transformers_version", "problem_type")


def old_spelling(config: dict) -> dict:
    """config.json as version 4 of transformers wrote it."""
    config = {key: value for key, value in config.items() if key not in ("dtype", "layer_types")}
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        theta, kind = rope.pop("rope_theta"), rope["rope_type"]
        config |= {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
    return {**config, "torch_dtype": "float32", "transformers_version": "4.40.0"}


def check_old_spelling(peer, folder) -> None:
    """Both spellings of config.json say one model."""
    new = ours_of(peer, folder)
    change_config(folder, old_spelling)
    old = minift.load_model(folder)
    assert old.config == new.config and old.labels == new.labels and old.head_kind == new.head_kind


def check_new_head(peer, folder, head: str, positions=False, more=None, **options) -> None:
    """A head that the peer's checkpoint lacks is new in ours, and the rest has the checkpoint's bits."""
    known = {name: p.clone() for name, p in ours_of(peer, folder / "lm").named_parameters()}
    ours = minift.load_model(folder / "lm", head=head, **options)
    assert ours.new_modules
    for name, p in ours.named_parameters():
        trunk = name.removeprefix(ours.trunk)
        same = [old for key, old in known.items() if key.endswith(trunk)] if trunk != name else []
        assert ours.is_new(name) or any(torch.equal(p, old) for old in same), name
    compare_everywhere(ours, theirs_of(ours, folder / "new"), more, positions)
