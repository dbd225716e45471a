"""What Triton makes of the kernels, without a GPU: registers, spills, shared memory, instructions.

Every launch form that the kernels' tests name (`BUILDS` in tests/kernels; needs the extra "test"), compiled
for sm_80, sm_90 and sm_100; with --quick the first of each op, for sm_90. Instructions per element are those
of the largest loop, divided by the elements that a thread handles in one turn; budgets hold on sm_90.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent / "tests"


def run(quick: bool) -> tuple[list[dict], dict]:
    before = list(sys.path)
    sys.path[:0] = [str(TESTS), str(TESTS / "kernels")]
    try:
        from machine_code import SHARED_MEMORY, builds, figures, inspect_build, ops

        forms = builds(ops())
    finally:
        sys.path[:] = before
    if quick:
        forms = sorted({op: (op, build) for op, build in reversed(forms)}.values(), key=lambda form: form[0])
    chips = (90,) if quick else SHARED_MEMORY
    rows = [figures(op, b, chip, inspect_build(b, chip)) for op, b in forms for chip in chips]
    return rows, {"device": "any"}
