"""What Triton makes of a kernel, without a GPU: compile ahead of time and read the machine code.

`Build` says how a kernel is launched and what its code must keep; `inspect_build` compiles it for one chip
and counts. Instructions per element are those of the largest loop (or of the whole kernel where it has none),
divided by the elements that a thread handles there: a static count, in which a branch that is never taken
weighs as much as the others. Tools: cuobjdump, from Triton's wheel.
"""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = Path(__file__).parent.parent.parent / "kernels"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have; CUDA C++ Programming Guide
AMD = GPUTarget("hip", "gfx942", 64)
TENSOR_CORE = ("HMMA", "HGMMA", "IMMA", "IGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
LINE = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?);")


@dataclass(frozen=True)
class Build:
    """One way of launching a kernel and the promises that its code keeps."""

    name: str
    kernel: object
    signature: dict  # argument -> "*bf16", "*u8", "i32", "fp32", ...; constants are left out
    constants: dict
    warps: int = 4
    stages: int = 3
    aligned: tuple[str, ...] = ()  # pointers and sizes divisible by 16
    elements: float | None = None  # that one thread handles in one turn of the largest loop
    budget: float | None = None  # instructions per element on sm_90
    promises: tuple[str, ...] = ()  # opcodes on sm_90, as "LDG.E.128"; "tensor" on every chip
    options: dict = field(default_factory=dict)  # of the launch, besides warps and stages


def ops() -> list[str]:
    """The ops that have a Triton kernel."""
    return sorted(p.stem for p in KERNELS.glob("*.py") if "_kernel(" in p.read_text(encoding="utf-8"))


def builds(ops: list[str]) -> list[tuple[str, Build]]:
    """(op, build) of the lists `BUILDS` in the ops' test files."""
    return [(op, b) for op in ops for b in getattr(importlib.import_module(f"test_{op}"), "BUILDS", [])]


def compile_build(build: Build, target: GPUTarget):
    names, constants = build.kernel.arg_names, dict(build.constants)
    if target.backend != "cuda" and "DECODE" in constants:
        constants["DECODE"] = "gather"  # "prmt" is NVIDIA's assembly
    signature = {n: "constexpr" if n in constants else build.signature[n] for n in names}
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in build.aligned}
    source = ASTSource(build.kernel, signature, constants, divisible)
    options = {"num_warps": build.warps, "num_stages": build.stages, **build.options}
    return triton.compile(source, target=target, options=options)


def inspect_build(build: Build, chip: int) -> dict:
    """Registers, spills (bytes), shared memory (bytes), opcodes -> count, instructions per element."""
    compiled = compile_build(build, GPUTarget("cuda", chip, 32))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources, code = _run("-res-usage", cubin), instructions(_run("-sass", cubin))
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", resources)}
    loop = largest_loop(code)
    return {
        "registers": used["REG"],
        "spills": used["LOCAL"] + used["STACK"],
        "shared": compiled.metadata.shared,
        "opcodes": Counter(opcode for _, opcode, _ in code),
        "loop": Counter(opcode.split(".")[0] for opcode in loop),
        "per element": len(loop) / build.elements if build.elements else None,
    }


def keeps(promise: str, opcodes) -> bool:
    """Whether the code has the promised opcode, perhaps with further modifiers: LDG.E.EF.128 is LDG.E.128."""
    if promise == "tensor":
        return any(opcode.split(".")[0] in TENSOR_CORE for opcode in opcodes)
    name, *modifiers = promise.split(".")
    return any(o.split(".")[0] == name and set(modifiers) <= set(o.split(".")) for o in opcodes)


def figures(op: str, build: Build, chip: int, found: dict) -> dict:
    """One row of the committed table, from what `inspect_build` found."""
    per_element = found["per element"]
    return {
        "op": op,
        "build": build.name,
        "chip": f"sm_{chip}",
        "registers": found["registers"],
        "spilled bytes": found["spills"],
        "shared bytes": found["shared"],
        "instructions per element": "-" if per_element is None else round(per_element, 2),
        "budget": build.budget if chip == 90 and build.budget else "-",
    }


def _run(flag: str, cubin: Path) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", flag, cubin], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """(address, opcode, operands), without the padding after the last instruction."""
    found = [LINE.search(line) for line in sass.splitlines()]
    code = [(int(m[1], 16), m[2], m[3]) for m in found if m]
    while code and (code[-1][1] == "NOP" or code[-1][1].startswith("BRA")):
        code.pop()
    return code


def largest_loop(code) -> list[str]:
    """Opcodes between a backward branch and its target, of the longest such stretch; all, without one.

    What stands after the last EXIT is out of line (retries of a wait): its branches back are no loops.
    """
    last = max((address for address, opcode, _ in code if opcode == "EXIT"), default=0)
    longest = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address <= last:
            body = [o for a, o, _ in code if int(target[1], 16) <= a <= address]
            longest = max(longest, body, key=len)
    return longest if len(longest) > 4 else [opcode for _, opcode, _ in code]
