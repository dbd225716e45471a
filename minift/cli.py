"""The command `minift`: parses and dispatches. Bad input is one sentence on stderr and exit status 2."""

import argparse
import os
import sys

import minift

USAGE = """minift VERB ...

  demo  [--quick] [--method qlora]       fine-tune SmolLM2 on functions and docstrings, before and after
  fetch NAME                             get real weights into the cache folder: smollm2, minilm
  train CONFIG.toml [--PATH VALUE ...]   fine-tune; --overwrite or --resume for a folder that holds a run
  plan  [CONFIG.toml] [--PATH VALUE ...] what that config would train, without loading weights
  params --model NAME --method lora --r 8 [--by layer|module] [--json]   parameters and bytes from shapes
  quantize MODEL [--format nf4] [--report [DIR]] [--output DIR]      error of each layer; a 4-bit checkpoint
  merge MODEL --adapter DIR --output DIR [--quantize nf4] [--mode M]  fold an adapter in, with its error
  rank show|advise|set|shrink|grow DIR [--r 4] [--energy 0.99] [--output DIR]    ranks of an adapter folder
  generate MODEL [--adapter DIR] TEXT    continue a text, or answer it with --chat
  env                                    versions, devices, which kernels run here and why

settings are the config's own paths: --method lora --method.r 16 --train.epochs 2
MINIFT_TRACEBACK=1 shows where an error came from"""


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    verbs = {
        "demo": demo,
        "fetch": fetch,
        "train": train,
        "plan": plan,
        "params": params,
        "quantize": quantize,
        "merge": merge,
        "rank": rank,
        "generate": generate,
        "env": env,
    }
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(minift.__version__)
        return 0
    # oneDNN keeps compiled products for 1024 shapes, and batches of ever new lengths fill that: 20 steps of
    # the demo then took 37 % longer and 330 MiB more. It reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    try:
        if argv[0] not in verbs:
            raise ValueError(f"unknown verb {argv[0]!r}; known: {', '.join(verbs)}")
        verbs[argv[0]](argv[1:])
        return 0
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("MINIFT_TRACEBACK"):
            raise
        print(f"minift: {' '.join(str(error).split()) or 'interrupted'}", file=sys.stderr)
        return 2
    except Exception as error:
        if os.environ.get("MINIFT_TRACEBACK"):
            raise
        print(
            f"minift: unexpected {type(error).__name__}: {error} (a bug; MINIFT_TRACEBACK=1 shows where)",
            file=sys.stderr,
        )
        return 1


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; usage: {self.format_usage().removeprefix('usage: ').strip()}")


def demo(argv):
    parser = _Parser("minift demo")
    parser.add_argument(
        "--quick", action="store_true", help="fewer rows and steps, under 90 seconds on 2 cores"
    )
    parser.add_argument(
        "--output", default="", help="folder of the run; default: out/demo or out/demo-quick, replaced"
    )
    parser.add_argument("--method", default="lora", help="lora or qlora")
    arguments = parser.parse_args(argv)
    from minift.demo import run

    run(arguments.quick, arguments.output, arguments.method)


def fetch(argv):
    parser = _Parser("minift fetch")
    parser.add_argument("name")
    from minift.fetch import fetch as get

    get(parser.parse_args(argv).name)


def env(argv):
    _Parser("minift env").parse_args(argv)
    from minift.reports.environment import run

    run()


def _run_config(verb, argv):
    parser = _Parser(f"minift {verb}", allow_abbrev=False)
    parser.add_argument("config", help="a .toml file, or the config.json of a run")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--resume", action="store_true")
    arguments, rest = parser.parse_known_args(argv)
    from minift import config

    tree = config.override(config.read_config(arguments.config), config.read_flags(rest))
    return config.run_config(tree), arguments


def train(argv):
    config, arguments = _run_config("train", argv)
    from minift.load import holds_quantized, load_model, load_tokenizer
    from minift.methods import apply
    from minift.training.loop import train as run

    tokenizer = load_tokenizer(config.model)
    recipe = config.quantize if holds_quantized(config.model) else config.base_quantization
    model = load_model(config.model, config.dtype, config.device, recipe)
    if model.quantization:
        print(model.quantization_table.totals())
    print(apply(model, config.method, seed=config.train.seed))
    metrics = run(
        model,
        tokenizer,
        config.data,
        config.train,
        valid=config.valid or None,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    print(", ".join(f"{name} {value}" for name, value in metrics.items()))
    print(f"adapter, log and plot are in {config.train.output}")


def _shapes_config(verb, argv):
    """A config of `plan` or `params`, which need no data and take the method's fields bare; other flags."""
    from minift import config

    named = argv[:1] if argv and not argv[0].startswith("--") else []
    flags = config.read_flags(argv[len(named) :])
    files = {*named, *([flags.pop("config")] if "config" in flags else [])}
    if len(files) > 1:
        raise ValueError(f"two configs are given, {' and '.join(sorted(files))}; leave one out")
    if not files and "model" not in flags:
        raise ValueError(f"minift {verb} needs a CONFIG.toml, or --model NAME and --method NAME")
    tree = {"data": "", **(config.read_config(files.pop()) if files else {})}
    own = {name: flags.pop(name) for name in ("by",) if verb == "params" and name in flags}
    return config.run_config(config.override(tree, config.place_bare(tree, flags))), own


def plan(argv):
    config, _ = _shapes_config("plan", argv)
    from minift.reports.parameters import plan_table

    print(plan_table(config.model, config.method, config.base_quantization, config.dtype))


def params(argv):
    config, own = _shapes_config("params", [word for word in argv if word != "--json"])
    from minift.reports.parameters import params as report

    recipe = config.base_quantization
    print(report(config.model, config.method, recipe, config.dtype, as_json="--json" in argv, **own))


def quantize(argv):
    parser = _Parser("minift quantize", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--output", default="", help="folder for a 4-bit checkpoint, as bitsandbytes' are")
    parser.add_argument("--report", nargs="?", const="out/quantize", default="", metavar="DIR")
    parser.add_argument("--text", default="", help="file for the perplexity; default: Python's reference")
    parser.add_argument("--dtype", default="bfloat16")
    _add_quantization(parser, "--")
    a = parser.parse_args(argv)
    if a.text and not a.report:
        raise ValueError("--text is for the perplexity in a report; give --report as well")
    recipe = _quantization(a, "")
    from minift.reports.quantization import quantize as run

    run(a.model, recipe, a.dtype, a.output, a.report, a.text)


def merge(argv):
    parser = _Parser("minift merge", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--mode", default="dequantized", help="dequantized, requantized or original")
    parser.add_argument("--text", default="", help="file for the logits; default: Python's reference")
    parser.add_argument("--dtype", default="bfloat16")
    _add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = _quantization(a, "quantize.") if _given(a) else None
    from minift.reports.merging import merge as run

    run(a.model, a.adapter, a.output, recipe, a.mode, a.dtype, a.text)


def rank(argv):
    parser = _Parser("minift rank", allow_abbrev=False)
    parser.add_argument("verb", help="show, advise, set, shrink or grow")
    parser.add_argument("adapter", help="a folder")
    parser.add_argument("--r", nargs="+", metavar="R", help="one rank, or RULE=RANK for some layers")
    parser.add_argument("--energy", type=float, help="share of the squared singular values to keep")
    parser.add_argument("--output", default="", help="a new folder")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that grow adds")
    a = parser.parse_args(argv)
    from minift.reports.ranks import parse_ranks
    from minift.reports.ranks import rank as run

    run(a.verb, a.adapter, parse_ranks(a.r), a.energy, a.output, a.seed)


QUANTIZATION_FIELDS = ("format", "block_size", "double_quant", "only", "skip")


def _add_quantization(parser, prefix: str) -> None:
    """--quantize nf4, --quantize.block_size 128 and so on, as in a config; or the fields alone."""
    for name in QUANTIZATION_FIELDS:
        names = [f"{prefix}{name}"] + (["--quantize"] if prefix != "--" and name == "format" else [])
        parser.add_argument(*names, dest=f"quantize.{name}", default=argparse.SUPPRESS)


def _given(arguments) -> dict[str, str]:
    return {name[9:]: value for name, value in vars(arguments).items() if name.startswith("quantize.")}


def _quantization(arguments, path: str):
    from minift.config import build
    from minift.quant import Quantization

    return build(Quantization, _given(arguments), path)


def generate(argv):
    parser = _Parser("minift generate", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--adapter")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    _add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = _quantization(a, "quantize.") if _given(a) else None
    from minift.data.collate import encode_prompt
    from minift.load import load_model, load_tokenizer
    from minift.methods.files import load_adapter
    from minift.models.generate import generate as continue_

    tokenizer = load_tokenizer(a.model)
    model = load_model(a.model, a.dtype, quantize=recipe)
    if a.adapter:
        load_adapter(model, a.adapter)
    prompt = encode_prompt(tokenizer, a.text, "chat" if a.chat else "none")
    new = continue_(
        model,
        [prompt],
        a.max_new_tokens,
        temperature=a.temperature,
        top_k=a.top_k,
        top_p=a.top_p,
        eos_ids=tokenizer.eos_ids,
        pad_id=tokenizer.pad_id,
        seed=a.seed,
    )
    print(tokenizer.decode(new[0]))


if __name__ == "__main__":
    sys.exit(main())
