"""The verbs of the command: each reads its words and calls the function that does the work.

Imports stand inside the functions, so that a typing error is told before torch is loaded.
"""

import argparse


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
    from minift.load import holds_quantized, load_model, load_tokenizer, save_model, save_tokenizer
    from minift.methods import apply
    from minift.methods.loftq import loftq_table
    from minift.training.loop import train as run

    tokenizer = load_tokenizer(config.model)
    recipe = config.quantize if holds_quantized(config.model) else config.base_quantization
    model = load_model(config.model, config.dtype, config.device, recipe)
    plan = apply(model, config.method.with_tokenizer(tokenizer), seed=config.train.seed)
    if model.quantization:
        print(model.quantization_table.totals())
    if getattr(config.method, "init", "") == "loftq":
        print(loftq_table(model.adapters["default"]))
    print(plan)
    metrics = run(
        model,
        tokenizer,
        config.data,
        config.train,
        valid=config.valid or None,
        overwrite=arguments.overwrite,
        resume=arguments.resume,
    )
    if getattr(config.method, "loftq_iterations", 1) > 1:  # the adapter belongs to this base and no other
        model.adapters.remove("default")
        save_model(model, f"{config.train.output}/base")
        save_tokenizer(tokenizer, f"{config.train.output}/base")
        print(f"the quantized base that LoftQ made is in {config.train.output}/base")
    print(", ".join(f"{name} {value}" for name, value in metrics.items()))
    what = "adapter"
    if not config.method.adapter_file:
        what = "model"
        save_tokenizer(tokenizer, f"{config.train.output}/model")
    print(f"{what}, log and plot are in {config.train.output}")


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
    _any_base(parser)
    _add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = _quantization(a, "quantize.") if _given(a) else None
    from minift.reports.merging import merge as run

    run(a.model, a.adapter, a.output, recipe, a.mode, a.dtype, a.text, not a.any_base)


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


def verify(argv):
    parser = _Parser("minift verify", allow_abbrev=False)
    parser.add_argument("adapter", help="a folder")
    parser.add_argument("--model", default="", help="the base; default: what adapter_config.json names")
    parser.add_argument("--text", default="", help="file for the logits; default: Python's reference")
    parser.add_argument("--dtype", default="float32")
    _any_base(parser)
    _add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = _quantization(a, "quantize.") if _given(a) else None
    from minift.reports.verify import verify as run

    run(a.adapter, a.model, a.text, not a.any_base, recipe, a.dtype)


def tokens(argv):
    parser = _Parser("minift tokens", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--k", type=int, default=5, help="tokens for each virtual token")
    _any_base(parser)
    a = parser.parse_args(argv)
    from minift.load import load_model, load_tokenizer
    from minift.methods.files import load_adapter
    from minift.reports.virtual_tokens import nearest_tokens

    model, tokenizer = load_model(a.model), load_tokenizer(a.model)
    load_adapter(model, a.adapter, check_base=not a.any_base)
    print(nearest_tokens(model, tokenizer, k=a.k))


def _any_base(parser) -> None:
    parser.add_argument(
        "--any-base", action="store_true", help="take an adapter that was trained on another base"
    )


QUANTIZATION_FIELDS = ("format", "block_size", "double_quant", "only", "skip")


def _add_quantization(parser, prefix: str) -> None:
    """--quantize nf4, --quantize.block_size 128 and so on, as in a config; or the fields alone."""
    for name in QUANTIZATION_FIELDS:
        names = [f"{prefix}{name}"] + (["--quantize"] if prefix != "--" and name == "format" else [])
        parser.add_argument(*names, dest=f"quantize.{name}", default=argparse.SUPPRESS)


def _given(arguments) -> dict[str, str]:
    return {
        name.removeprefix("quantize."): value
        for name, value in vars(arguments).items()
        if name.startswith("quantize.")
    }


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
    _any_base(parser)
    parser.add_argument("--any-template", action="store_true", help="and with another chat template")
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
    from minift.methods.fingerprint import NO_TEMPLATE
    from minift.models.generate import generate as continue_

    tokenizer = load_tokenizer(a.model)
    model = load_model(a.model, a.dtype, quantize=recipe)
    if a.adapter:
        template = tokenizer.chat_template if a.chat else NO_TEMPLATE
        load_adapter(
            model, a.adapter, check_base=not a.any_base, template=None if a.any_template else template
        )
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
