"""Run every benchmark, or those named: python -m benchmarks [--quick] [train_step attention ...]"""

import argparse
from importlib import import_module
from pathlib import Path

NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))

if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats and shapes; results are not written"
    )
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="default: all")
    arguments = parser.parse_args()
    for name in arguments.names or NAMES:
        print(f"== {name}", flush=True)
        import_module(f"benchmarks.bench_{name}").run(arguments.quick)
