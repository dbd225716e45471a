"""The verbs that train, count and generate: each reads its words and calls the function that does the work.

Imports stand inside the functions, so that a typing error is told before torch is loaded.
"""

import argparse

from minift.words import Parser, add_any_base, add_quantization, given, quantization


def demo(argv):
    parser = Parser("minift demo")
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
    parser = Parser("minift fetch")
    parser.add_argument("name")
    from minift.fetch import fetch as get

    get(parser.parse_args(argv).name)


def metrics(argv):
    parser = Parser("minift metrics")
    parser.add_argument("what", choices=("list", "explain"))
    parser.add_argument("name", nargs="?", help="of a metric, for explain")
    arguments = parser.parse_args(argv)
    if (arguments.what == "explain") != (arguments.name is not None):
        raise ValueError("give `minift metrics list`, or `minift metrics explain NAME`")
    from minift.metrics import catalogue

    print(catalogue.explain(arguments.name) if arguments.name else catalogue.listing())


def env(argv):
    Parser("minift env").parse_args(argv)
    from minift.reports.environment import run

    run()


def _run_config(verb, argv):
    parser = Parser(f"minift {verb}", allow_abbrev=False)
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
    model = load_model(
        config.model, config.dtype, config.device, recipe, **_head(config), seed=config.train.seed
    )
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


def _head(config) -> dict:
    """What `load_model` is asked for: a head and its labels, those of the data where the config has none."""
    from minift.data.rows import LABELLED, label_arguments, read_rows
    from minift.load import build_model

    asked = {"head": config.head, "labels": config.labels, "num_labels": config.num_labels}
    asked = {name: value for name, value in asked.items() if value}
    unknown = list(asked) == ["head"] and config.head == "sequence_classification" and config.data
    if unknown and build_model(config.model).head_kind != config.head:
        asked |= label_arguments(read_rows(config.data, LABELLED))
    return asked


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

    print(plan_table(config.model, config.method, config.base_quantization, config.dtype, _head(config)))


def params(argv):
    config, own = _shapes_config("params", [word for word in argv if word != "--json"])
    from minift.reports.parameters import params as report

    recipe = config.base_quantization
    head, as_json = _head(config), "--json" in argv
    print(report(config.model, config.method, recipe, config.dtype, as_json=as_json, head=head, **own))


# Settings of generate as words: fields of models.sampling.Decoding.
DECODING = {
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "num_beams": int,
    "length_penalty": float,
    "early_stopping": lambda word: {"true": True, "false": False}.get(word, word),
    "seed": int,
}


def generate(argv):
    parser = Parser("minift generate", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--adapter")
    parser.add_argument("--chat", action="store_true")
    add_any_base(parser)
    parser.add_argument("--any-template", action="store_true", help="and with another chat template")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    for name, kind in DECODING.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS)
    parser.add_argument("--stop", action="append", help="a text that ends the answer; any number of them")
    add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = quantization(a, "quantize.") if given(a) else None
    from minift.data.collate import encode_prompt
    from minift.load import load_model, load_tokenizer
    from minift.methods.files import load_adapter, trained_head
    from minift.methods.fingerprint import NO_TEMPLATE
    from minift.models.generate import generate as continue_
    from minift.models.generate import stream

    tokenizer = load_tokenizer(a.model)
    model = load_model(a.model, a.dtype, quantize=recipe, **(trained_head(a.adapter) if a.adapter else {}))
    if a.adapter:
        template = tokenizer.chat_template if a.chat else NO_TEMPLATE
        load_adapter(
            model, a.adapter, check_base=not a.any_base, template=None if a.any_template else template
        )
    if model.is_encoder_decoder and a.chat:
        raise ValueError(f"--chat is for decoders, and {a.model} has an encoder that reads TEXT as it is")
    prompt = (
        tokenizer.encode(a.text, special_tokens=True)
        if model.is_encoder_decoder
        else encode_prompt(tokenizer, a.text, "chat" if a.chat else "none")
    )
    asked = {name: value for name, value in vars(a).items() if name in DECODING}
    asked |= {"tokenizer": tokenizer, "stop": tuple(a.stop or ())}
    if asked.get("num_beams", 1) > 1:  # known at the end alone
        print(tokenizer.decode(continue_(model, [prompt], a.max_new_tokens, **asked)[0]))
        return
    for _, piece in stream(model, [prompt], a.max_new_tokens, **asked):
        print(piece, end="", flush=True)
    print()
