"""Text to token ids and back, through the `tokenizers` library.

From tokenizer.json and its neighbours, or from the vocabulary and merges inside a GGUF file.
"""

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minift.data.chat import render

GGUF_CONTROL, GGUF_USER_DEFINED = 3, 4  # token types of the GGUF specification
MOST_BYTES, MOST_BYTES_BESIDE = 2**26, 2**22  # of tokenizer.json, of the files beside it
NOT_OF_THE_FILE = (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError)


@dataclass(frozen=True)
class Tokenizer:
    backend: Backend
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Every id that ends an answer; the first one is written after a training completion."""
    pad_id: int
    chat_template: str | None

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Ids of a text. Special tokens spelled out in it are recognised.

        `special_tokens` adds those that the tokenizer puts around a text (BOS, or [CLS] and [SEP]), never a
        second BOS.
        """
        ids = self.backend.encode(text, add_special_tokens=special_tokens).ids
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id] else ids

    def encode_texts(
        self, text: str, pair: str | None = None, most: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids and token types of a text, or of two, with the special tokens that the tokenizer adds.

        With `most`, a longer result is cut: tokens are taken off the end of the text that is then the longer.
        """
        parts = [
            self.backend.encode(part, add_special_tokens=False) for part in (text, pair) if part is not None
        ]
        if most is not None:
            room = most - self.backend.num_special_tokens_to_add(pair is not None)
            for part, length in zip(parts, shares(list(map(len, parts)), room), strict=True):
                part.truncate(length)
        whole = self.backend.post_process(*parts)
        twice = self.bos_id is not None and whole.ids[:2] == [self.bos_id, self.bos_id]
        return whole.ids[twice:], whole.type_ids[twice:]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render_chat(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Text of [{"role": ..., "content": ...}, ...] under the checkpoint's own template."""
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template; use template = 'none'")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_ids[0] if self.eos_ids else None}
        tokens = {name: self.backend.id_to_token(i) for name, i in names.items() if i is not None}
        return render(self.chat_template, messages, add_generation_prompt, **tokens)

    def encode_chat(self, messages: list[dict], add_generation_prompt: bool = False) -> list[int]:
        """Ids of the rendered conversation; the template alone decides about BOS."""
        return self.encode(self.render_chat(messages, add_generation_prompt))


def shares(lengths: list[int], room: int) -> list[int]:
    """Lengths that add up to `room` at most, cut from the longest first: [7, 3] in 6 is [3, 3]."""
    if room < len(lengths):
        raise ValueError(f"no room for {len(lengths)} text(s) in {room} tokens; raise train.max_length")
    lengths = list(lengths)
    while (over := sum(lengths) - room) > 0:
        longest = lengths.index(max(lengths))
        others = max([n for i, n in enumerate(lengths) if i != longest], default=0)
        lengths[longest] -= min(over, max(1, lengths[longest] - others))
    return lengths


def from_folder(folder: Path) -> Tokenizer:
    """tokenizer.json, with special tokens and template from the other files of the folder."""
    path = folder / "tokenizer.json"
    data = _read(path, MOST_BYTES)
    if data is None:
        raise ValueError(
            f"{path} is missing; save the tokenizer in its fast form (tokenizer.json) beside the model"
        )
    try:
        backend = Backend.from_buffer(data)
    except BaseException as error:  # the library's panics do not derive from Exception
        if isinstance(error, NOT_OF_THE_FILE):
            raise
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    settings = {
        name: _json(folder / name)
        for name in (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        )
    }
    ids = {role: _special_ids(backend, settings, role) for role in ("bos", "eos", "pad")}
    template = settings["tokenizer_config.json"].get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    template_file = _read(folder / "chat_template.jinja", MOST_BYTES_BESIDE)
    if template_file is not None:
        template = template_file.decode("utf-8")
    return _build(backend, ids["bos"], ids["eos"], ids["pad"], template)


def _read(path: Path, most: int) -> bytes | None:
    """A regular file of at most `most` bytes; links are not followed. None where there is none."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # or a pipe would wait
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); links are not followed") from None
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise ValueError(f"{path} is no regular file of at most {most} bytes")
        return file.read(most)


def _json(path: Path) -> dict:
    data = _read(path, MOST_BYTES_BESIDE)
    try:
        values = {} if data is None else json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def _special_ids(backend: Backend, settings: dict[str, dict], role: str) -> tuple[int, ...]:
    """All ids that any of the files gives a role, in the order of the files."""
    found = []
    for values in settings.values():
        token, ids = values.get(f"{role}_token"), values.get(f"{role}_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found.append(backend.token_to_id(token))
        found += ids if isinstance(ids, list) else [ids]
    return tuple(dict.fromkeys(_whole(i, f"{role}_token_id") for i in found if i not in (None, -1)))


def _whole(value, name: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{name} is {str(value)[:80]!r}; expected the number of a token")
    return value


def from_gguf(metadata: dict) -> Tokenizer:
    """Byte-level BPE from `tokenizer.ggml.*`; the two pre-tokenizers below are known."""
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    splits = {"smollm": [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": []}
    if kind != "gpt2" or not isinstance(pre, str) or pre not in splits:
        raise ValueError(
            f"GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not supported; supported: 'gpt2' "
            f"with {', '.join(map(repr, splits))}; give a folder with tokenizer.json instead"
        )
    try:
        backend = _bpe(metadata, splits[pre])
    except BaseException as error:  # a missing key, or what the library raises for a merge it cannot use
        if isinstance(error, NOT_OF_THE_FILE):
            raise
        raise ValueError(f"the GGUF file's tokenizer is damaged: {type(error).__name__}: {error}") from None
    ids = {
        role: (_whole(metadata[key], key),) if (key := f"tokenizer.ggml.{name}_token_id") in metadata else ()
        for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return _build(backend, ids["bos"], ids["eos"], ids["pad"], metadata.get("tokenizer.chat_template"))


def _bpe(metadata: dict, splits: list) -> Backend:
    """Vocabulary, merges, special tokens, and BOS where the file asks for one."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(t, special=True, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == GGUF_CONTROL
        ]
    )
    backend.add_tokens(
        [
            AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types, strict=True)
            if kind == GGUF_USER_DEFINED
        ]
    )
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    return backend


def _build(backend, bos, eos, pad, template) -> Tokenizer:
    if not isinstance(template, str | None):
        raise ValueError(f"chat_template is {str(template)[:80]!r}; expected a text")
    pad_id = (pad or eos or (0,))[0]  # padding is masked, so any id serves where none is named
    return Tokenizer(backend, bos[0] if bos else None, eos, pad_id, template)
