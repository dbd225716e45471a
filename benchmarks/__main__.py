"""Run every benchmark, or those named: python -m benchmarks [--quick] [--output FOLDER] [matmul_4bit ...]"""

import argparse
import sys
import traceback
from importlib import import_module
from pathlib import Path

from benchmarks.harness import RESULTS, report
from benchmarks.limits import machine

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main() -> int:
    """The number of benchmarks that failed; the others run all the same."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer repeats and shapes; written only where --output says"
    )
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="default: all")
    arguments = parser.parse_args()
    folder = arguments.output or (None if arguments.quick else RESULTS)
    # The folder kernels/ must not hide the distribution of that name, which bitsandbytes looks for.
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    print(machine(), flush=True)  # measures it, before anything else runs on it
    failed = []
    for name in arguments.names or NAMES:
        print(f"== {name}", flush=True)
        try:
            rows, details = import_module(f"benchmarks.bench_{name}").run(arguments.quick)
            report(name, rows, details, folder)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
