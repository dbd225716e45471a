"""config.json as frozen dataclasses with its own field names, checked before anything is made of them.

A family's config names its fields, the fields that change the forward with the values that it computes
(`MUST_BE`); what else it reads stands in its `from_hf`.
"""

import typing
from dataclasses import MISSING, asdict, dataclass, fields
from typing import ClassVar

# Fields of any family: weights in a format of their own, a class that comes with the checkpoint.
NEVER = {"quantization_config": (None,), "auto_map": (None,)}
LARGEST = 2**31 - 1  # of a count: what a dimension of a tensor may be
MOST_BLOCKS = 1024


@dataclass(frozen=True)
class ModelConfig:
    """Subclasses add their fields, with a default where config.json may leave one out."""

    MUST_BE: ClassVar[
        dict
    ] = {}  # field of config.json that changes the forward -> the values that are computed
    BLOCKS: ClassVar[tuple[str, ...]] = ("num_hidden_layers",)  # fields that count blocks
    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ("pad_token_id", "eos_token_id", "decoder_start_token_id")

    def __post_init__(self):
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            _check_value(field.name, getattr(self, field.name), hints[field.name], self.MAY_BE_ZERO)
        for name in self.BLOCKS:
            if getattr(self, name) > MOST_BLOCKS:
                raise ValueError(
                    f"config.json: {name} is {getattr(self, name)}; at most {MOST_BLOCKS} are allowed"
                )

    @classmethod
    def from_hf(cls, config: dict) -> "ModelConfig":
        """From config.json's fields; one that is missing, out of range or not supported is an error."""
        check_supported(config, {**NEVER, **cls.MUST_BE})
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        return cls(**values)

    def to_hf(self) -> dict:
        """The fields of config.json that say this forward; without architectures and labels."""
        fixed = {name: values[0] for name, values in self.MUST_BE.items() if values[0] is not None}
        return {**fixed, **asdict(self)}


def check_supported(config: dict, must_be: dict) -> None:
    for name, values in must_be.items():
        if name in config and config[name] not in values:
            raise ValueError(
                f"config.json: {name} = {config[name]!r} changes the forward and is not supported; "
                f"supported: {' or '.join(map(repr, values))}"
            )


def check_multiple(config, name: str, of: str) -> None:
    """One field is a multiple of another."""
    if getattr(config, name) % getattr(config, of):
        raise ValueError(
            f"config.json: {name} {getattr(config, name)} is no multiple of {of} {getattr(config, of)}"
        )


def check_choice(config, name: str, known) -> None:
    if getattr(config, name) not in known:
        raise ValueError(
            f"config.json: {name} is {getattr(config, name)!r}; supported: {', '.join(map(repr, known))}"
        )


def _check_value(name: str, value, hint, may_be_zero) -> None:
    allowed = typing.get_args(hint) or (hint,)
    if value is None and type(None) in allowed:
        return
    kind = allowed[0]
    if kind not in (int, float, bool, str):
        return  # a table, which its family checks
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"config.json: {name} is {value!r}, expected {kind.__name__}")
    if kind is int and not (0 if name in may_be_zero else 1) <= value <= LARGEST:
        raise ValueError(f"config.json: {name} is {value}; it must be positive and at most {LARGEST}")
    if kind is float and not 0 < value < float("inf"):
        raise ValueError(f"config.json: {name} is {value}; it must be positive and finite")
