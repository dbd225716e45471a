"""The verbs for models and adapters on disk; see verbs.py."""

from minift.words import Parser, add_any_base, add_quantization, given, quantization


def quantize(argv):
    parser = Parser("minift quantize", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--output", default="", help="folder for a 4-bit checkpoint, as bitsandbytes' are")
    parser.add_argument("--report", nargs="?", const="out/quantize", default="", metavar="DIR")
    parser.add_argument("--text", default="", help="file for the perplexity; default: Python's reference")
    parser.add_argument("--dtype", default="bfloat16")
    add_quantization(parser, "--")
    a = parser.parse_args(argv)
    if a.text and not a.report:
        raise ValueError("--text is for the perplexity in a report; give --report as well")
    recipe = quantization(a, "")
    from minift.reports.quantization import quantize as run

    run(a.model, recipe, a.dtype, a.output, a.report, a.text)


def merge(argv):
    parser = Parser("minift merge", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--mode", default="dequantized", help="dequantized, requantized or original")
    parser.add_argument("--text", default="", help="file for the logits; default: Python's reference")
    parser.add_argument("--dtype", default="bfloat16")
    add_any_base(parser)
    add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = quantization(a, "quantize.") if given(a) else None
    from minift.reports.merging import merge as run

    run(a.model, a.adapter, a.output, recipe, a.mode, a.dtype, a.text, not a.any_base)


def rank(argv):
    parser = Parser("minift rank", allow_abbrev=False)
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
    parser = Parser("minift verify", allow_abbrev=False)
    parser.add_argument("adapter", help="a folder")
    parser.add_argument("--model", default="", help="the base; default: what adapter_config.json names")
    parser.add_argument("--text", default="", help="file for the logits; default: Python's reference")
    parser.add_argument("--dtype", default="float32")
    add_any_base(parser)
    add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = quantization(a, "quantize.") if given(a) else None
    from minift.reports.verify import verify as run

    run(a.adapter, a.model, a.text, not a.any_base, recipe, a.dtype)


def tokens(argv):
    parser = Parser("minift tokens", allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--k", type=int, default=5, help="tokens for each virtual token")
    add_any_base(parser)
    a = parser.parse_args(argv)
    from minift.load import load_model, load_tokenizer
    from minift.methods.files import load_adapter, trained_head
    from minift.reports.virtual_tokens import nearest_tokens

    model, tokenizer = load_model(a.model, **trained_head(a.adapter)), load_tokenizer(a.model)
    load_adapter(model, a.adapter, check_base=not a.any_base)
    print(nearest_tokens(model, tokenizer, k=a.k))


def inspect(argv):
    parser = Parser("minift inspect", allow_abbrev=False)
    parser.add_argument("model", help="alias, folder, .gguf file or preset")
    parser.add_argument("--head", default=None, help="another head than the checkpoint's")
    parser.add_argument("--num-labels", type=int, default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", nargs="?", const="tree.png", default="", metavar="FILE")
    add_quantization(parser, "--quantize.")
    a = parser.parse_args(argv)
    recipe = quantization(a, "quantize.") if given(a) else None
    from minift.reports.module_tree import describe, module_tree
    from minift.reports.parameters import shapes
    from minift.reports.plots import plot_tree

    asked = {name: getattr(a, name) for name in ("head", "num_labels") if getattr(a, name) is not None}
    model = shapes(a.model, a.dtype, recipe, asked)
    print(describe(model, a.json))
    if a.plot and not plot_tree(module_tree(model), a.plot):
        raise ValueError("--plot needs matplotlib: pip install -c constraints.txt -e '.[plots]'")
