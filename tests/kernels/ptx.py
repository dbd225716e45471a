"""An emulator of the PTX instructions that the kernels write themselves.

A register is an array, one number for each lane. Source: PTX ISA, section 9.7 (Instructions).
"""

import numpy as np
import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def prmt(a, b, selector):
    """Byte i of the result: byte (selector >> 4i) & 7 of b:a, or its sign, eight times, if bit 3 is set."""
    pair = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(pair)
    for i in range(4):
        code = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = pair >> (code & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = (byte >> np.uint64(7)) * np.uint64(255)
        out |= np.where(code & np.uint64(8), sign, byte) << np.uint64(8 * i)
    return out.astype(np.uint32)


def lop3(a, b, c, table):
    """Bit by bit, the table's entry 4a + 2b + c."""
    bits = [(~a if not i & 4 else a) & (~b if not i & 2 else b) & (~c if not i & 1 else c) for i in range(8)]
    return sum(bit for i, bit in enumerate(bits) if table[0] >> np.uint32(i) & 1)


def to_16_bits(numbers, dtype):
    """fp32 bits -> the bits of the 16-bit dtype, to nearest, ties to even, as torch rounds."""
    return (
        torch.from_numpy(numbers.view(np.float32).copy()).to(dtype).view(torch.int16).numpy().view(np.uint16)
    )


def emulate(asm, inputs, memory=None, lanes=32):
    """Runs PTX text; inputs and results are by operand number, memory is what `ld.global` reads from 0 on."""
    registers = {f"${i}": np.broadcast_to(np.uint32(v), lanes) for i, v in inputs.items()}
    registers |= {"%laneid": np.arange(lanes, dtype=np.uint32) % 32}

    def value(name):
        if name in registers:
            return registers[name]
        return np.full(lanes, int(name.replace("0f", "0x"), 16 if name.startswith("0") else 10), np.uint32)

    def from_lane(numbers, lane):
        return np.where(lane < 32, numbers[np.minimum(lane, lanes - 1)], numbers)

    lane = registers["%laneid"]
    run = {
        "and.b32": np.bitwise_and,
        "xor.b32": np.bitwise_xor,
        "add.u32": np.add,
        "shr.u32": np.right_shift,
        "lop3.b32": lop3,
        "prmt.b32": prmt,
        "mov.u32": lambda a: a,
        "mad.wide.u32": lambda a, b, c: a * b + c,
        "ld.global.b32": lambda at: memory.view(np.uint32)[at // 4],
        "sub.rn.f32": lambda a, b: (a.view(np.float32) - b.view(np.float32)).view(np.uint32),
        "shfl.sync.down.b32": lambda a, by, clamp, mask: from_lane(a, lane + by),
        "shfl.sync.idx.b32": lambda a, at, clamp, mask: from_lane(a, at),
    }
    for name, dtype in DTYPES.items():
        run[f"cvt.rn.{name}x2.f32"] = lambda high, low, dtype=dtype: (
            to_16_bits(high, dtype).astype(np.uint32) << np.uint32(16) | to_16_bits(low, dtype)
        )
    for line in asm.strip().strip("{}").split(";"):
        opcode, _, operands = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        to, *rest = (name.strip("[]{} ") for name in operands.split(","))
        if opcode == "mov.b32":  # {low, high}, both
            registers[to], registers[rest[0]] = value(rest[1]) & 0xFFFF, value(rest[1]) >> np.uint32(16)
        else:
            registers[to] = run[opcode](*(np.asarray(value(name)) for name in rest)).astype(np.uint32)
    return registers
