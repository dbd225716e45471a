"""What Triton makes of a kernel, without a GPU: compile ahead of time and read the machine code.

`Build` says how a kernel is launched and what its code must keep; `inspect_build` compiles it for one chip
and counts. Instructions per element are those of the largest loop (or of the whole kernel where it has none),
divided by the elements that a thread handles there. Tools: cuobjdump from Triton's wheel.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may have; CUDA C++ Programming Guide
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
    promises: tuple[str, ...] = field(default=())  # opcodes on sm_90, as "LDG.E.128"; "tensor" on every chip


def compile_build(build: Build, target: GPUTarget):
    names = build.kernel.arg_names
    signature = {n: "constexpr" if n in build.constants else build.signature[n] for n in names}
    divisible = {(names.index(n),): [["tt.divisibility", 16]] for n in build.aligned}
    source = ASTSource(build.kernel, signature, dict(build.constants), divisible)
    options = {"num_warps": build.warps, "num_stages": build.stages}
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
    """Opcodes between a backward branch and its target, of the longest such stretch; all, without one."""
    loops = [[opcode for _, opcode, _ in code]]
    best = 0
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if opcode.startswith("BRA") else None
        if target and int(target[1], 16) < address:
            body = [o for a, o, _ in code if int(target[1], 16) <= a <= address]
            if len(body) > max(best, 4):
                best, loops[0] = len(body), body
    return loops[0]
