"""Machine code of every Triton kernel, without a GPU: no spills, shared memory that fits, promises, budgets.

Each `BUILDS` of a kernel's test file is compiled for sm_90; sm_80, sm_100 and AMD's gfx942 are slow tests.
"""

import importlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine_code
import pytest
from machine_code import AMD, SHARED_MEMORY, Build, compile_build, figures, inspect_build, keeps, largest_loop

from minift.kernels.runtime import INTERPRETED, tl, triton

ROOT = Path(__file__).parent.parent.parent
TABLE = ROOT / "benchmarks" / "results" / "machine_code.json"
OPS = machine_code.ops()
ROWS = {f"{op}: {build.name}": (op, build) for op, build in machine_code.builds(OPS)}
OTHER_CHIPS = [chip for chip in SHARED_MEMORY if chip != 90]

compiles = pytest.mark.skipif(INTERPRETED, reason="kernels are interpreted in this process, not compiled")


@pytest.fixture(scope="module")
def found(request):
    """(row, chip) -> what was found; what the selected tests need is compiled side by side."""
    wanted = [
        getattr(item, "callspec", None) for item in request.session.items if item.path == Path(__file__)
    ]
    wanted = [call.params for call in wanted if call and "row" in call.params]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {}

        def start(row, chip=90):
            if (row, chip) not in started:
                started[row, chip] = pool.submit(inspect_build, ROWS[row][1], chip)
            return started[row, chip]

        for params in wanted:
            start(**params)
        yield lambda row, chip: start(row, chip).result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("op", OPS)
def test_every_triton_kernel_is_among_the_builds(op):
    module = importlib.import_module(f"minift.kernels.{op}")
    kernels = {name for name in vars(module) if name.endswith("_kernel")}
    assert kernels, f"{op} has no kernel under its own name"
    built = {build.kernel for there, build in ROWS.values() if there == op}
    assert {name for name in kernels if getattr(module, name) not in built} == set()


def test_builds_have_names_of_their_own():
    assert len(ROWS) == len(machine_code.builds(OPS))


@compiles
@pytest.mark.parametrize("row", ROWS)
def test_on_sm_90_nothing_spills_and_promises_and_budgets_hold(row, found):
    check(found(row, 90), 90)
    build, code = ROWS[row][1], found(row, 90)
    assert [p for p in build.promises if not keeps(p, code["opcodes"])] == []
    if build.budget is not None:
        assert code["per element"] <= build.budget


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("chip", OTHER_CHIPS, ids=lambda chip: f"sm_{chip}")
@pytest.mark.parametrize("row", ROWS)
def test_on_other_chips_nothing_spills_and_products_use_tensor_cores(row, chip, found):
    check(found(row, chip), chip)
    if "tensor" in ROWS[row][1].promises:
        assert keeps("tensor", found(row, chip)["opcodes"])


def check(code: dict, chip: int) -> None:
    assert code["spills"] == 0
    assert code["shared"] <= SHARED_MEMORY[chip]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_compiles_for_amd(row):
    assert compile_build(ROWS[row][1], AMD).asm["hsaco"]


@compiles
@pytest.mark.slow
def test_the_committed_table_is_what_triton_makes(found):
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    version = table["machine"]["versions"]["triton"]
    if version != triton.__version__:
        pytest.skip(f"the table was made by Triton {version}; this is {triton.__version__}")
    made = [figures(*ROWS[row], chip, found(row, chip)) for row in ROWS for chip in SHARED_MEMORY]
    assert made == table["rows"]


@triton.jit
def many_values_kernel(x, y, n, BLOCK: tl.constexpr):
    """Keeps BLOCK numbers alive over a loop, so that few registers are not enough."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(n):
        total += tl.load(x + step * BLOCK + i)
    tl.store(y + i, total)


SIGNATURE = {"x": "*fp32", "y": "*fp32", "n": "i32"}


@compiles
def test_the_tool_sees_a_loop_wide_loads_and_spills():
    shape = {"constants": {"BLOCK": 8192}, "aligned": ("x", "y"), "elements": 64}
    wide = inspect_build(Build("wide", many_values_kernel, SIGNATURE, **shape), 90)
    assert wide["spills"] == 0 and keeps("LDG.E.128", wide["opcodes"])
    assert wide["loop"]["FADD"] == 64 and 1.25 <= wide["per element"] <= 2  # an addition, a quarter of a load
    few = inspect_build(Build("few", many_values_kernel, SIGNATURE, **shape, options={"maxnreg": 32}), 90)
    assert few["registers"] <= 32 and few["spills"] > 0


def test_promises_allow_further_modifiers_but_no_narrower_access():
    assert keeps("LDG.E.128", ["LDG.E.EF.128"]) and keeps("STG.E.128", ["STG.E.128"])
    assert not keeps("LDG.E.128", ["LDG.E.64", "LDGSTS.E.128", "STG.E.128"])
    assert keeps("tensor", ["FADD", "HGMMA.64"]) and not keeps("tensor", ["FADD"])


def test_a_loop_ends_at_a_backward_branch_before_the_last_exit():
    code = [(16 * i, "FADD", "") for i in range(20)]
    code[15] = (240, "BRA", "0x50")  # ten instructions back
    code[17] = (272, "EXIT", "")
    code[19] = (304, "BRA", "0x10")  # out of line
    assert len(largest_loop(code)) == 11
    assert len(largest_loop([line for line in code if line[0] != 240])) == 19
