"""Words that several verbs take."""

import argparse

QUANTIZATION_FIELDS = ("format", "block_size", "double_quant", "only", "skip")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; usage: {self.format_usage().removeprefix('usage: ').strip()}")


def add_any_base(parser) -> None:
    parser.add_argument(
        "--any-base", action="store_true", help="take an adapter that was trained on another base"
    )


def add_quantization(parser, prefix: str) -> None:
    """--quantize nf4, --quantize.block_size 128 and so on, as in a config; or the fields alone."""
    for name in QUANTIZATION_FIELDS:
        names = [f"{prefix}{name}"] + (["--quantize"] if prefix != "--" and name == "format" else [])
        parser.add_argument(*names, dest=f"quantize.{name}", default=argparse.SUPPRESS)


def given(arguments) -> dict[str, str]:
    return {
        name.removeprefix("quantize."): value
        for name, value in vars(arguments).items()
        if name.startswith("quantize.")
    }


def quantization(arguments, path: str):
    from minift.config import build
    from minift.quant import Quantization

    return build(Quantization, given(arguments), path)
