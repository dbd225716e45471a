"""The command `minift`: parses and dispatches. Bad input is one sentence on stderr and exit status 2."""

import os
import sys

import minift
from minift import verbs, verbs_disk

USAGE = """minift VERB ...

  demo  [--quick] [--method qlora]       fine-tune SmolLM2 on functions and docstrings, before and after
  fetch NAME                             get real weights into the cache folder: smollm2, minilm
  train CONFIG.toml [--PATH VALUE ...]   fine-tune; --overwrite or --resume for a folder that holds a run
  plan  [CONFIG.toml] [--PATH VALUE ...] what that config would train, without loading weights
  params --model NAME --method lora --r 8 [--by layer|module] [--json]   parameters and bytes from shapes
  inspect MODEL [--head H --num-labels N] [--quantize nf4] [--plot [FILE]] [--json]   the module tree
  quantize MODEL [--format nf4] [--report [DIR]] [--output DIR]      error of each layer; a 4-bit checkpoint
  merge MODEL --adapter DIR --output DIR [--quantize nf4] [--mode M]  fold an adapter in, with its error
  rank show|advise|set|shrink|grow DIR [--r 4] [--energy 0.99] [--output DIR]    ranks of an adapter folder
  verify DIR [--model MODEL]             an adapter through our code, its merge and peft: largest difference
  tokens MODEL --adapter DIR [--k 5]     the vocabulary's tokens nearest to each learned virtual token
  generate MODEL TEXT [--adapter DIR]    continue a text as a stream, or answer it with --chat; --num-beams N
        or --temperature T, --top-k, --top-p, --min-p; --repetition-penalty R, --stop TEXT
  metrics list | explain NAME            every metric: formula, range, when to use it, when it lies
  env                                    versions, devices, which kernels run here and why

settings are the config's own paths: --method lora --method.r 16 --train.epochs 2
MINIFT_TRACEBACK=1 shows where an error came from"""


VERBS = {
    verb.__name__: verb
    for verb in (
        *(
            verbs.demo,
            verbs.fetch,
            verbs.train,
            verbs.plan,
            verbs.params,
            verbs.generate,
            verbs.metrics,
            verbs.env,
        ),
        *(verbs_disk.inspect, verbs_disk.quantize, verbs_disk.merge, verbs_disk.rank),
        *(verbs_disk.verify, verbs_disk.tokens),
    )
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    settings = argv[:1] in (["train"], ["plan"], ["params"]) and {"-h", "--help"} & set(argv)
    if not argv or argv[0] in ("-h", "--help", "help") or settings:
        print(USAGE)
        return 0
    if argv[0] == "--version":
        print(minift.__version__)
        return 0
    # oneDNN keeps compiled products for 1024 shapes, and batches of ever new lengths fill that: 20 steps of
    # the demo then took 37 % longer and 330 MiB more. It reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    try:
        if argv[0] not in VERBS:
            raise ValueError(f"unknown verb {argv[0]!r}; known: {', '.join(VERBS)}")
        VERBS[argv[0]](argv[1:])
        return 0
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


if __name__ == "__main__":
    sys.exit(main())
