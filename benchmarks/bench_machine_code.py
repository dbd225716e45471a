"""What Triton makes of the kernels, without a GPU: registers, spills, shared memory, instructions.

Every launch form that the kernels' tests name (`BUILDS` in tests/kernels; needs the extra "test"), compiled
for sm_80, sm_90 and sm_100 (one of them with --quick: sm_90). Instructions per element are those of the
largest loop, divided by the elements that a thread handles in one turn of it; budgets hold on sm_90.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(quick: bool) -> tuple[list[dict], dict]:
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]
    from machine_code import SHARED_MEMORY, builds, figures, inspect_build, ops

    chips = (90,) if quick else SHARED_MEMORY
    rows = [figures(op, b, chip, inspect_build(b, chip)) for op, b in builds(ops()) for chip in chips]
    return rows, {"device": "any"}
