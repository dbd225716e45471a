"""The C file of kernels/cpu, called through ctypes: which instruction set it runs, and why it may be missing.

`setup.py` builds it where there is a C compiler; without one every op runs in plain torch. The processor
decides at load time among the instruction sets of LEVELS; MINIFT_CPU names a lower one. Threads are torch's.
"""

import ctypes
import os
from pathlib import Path

import torch

from minift.kernels.packed import Packed

LEVELS = ("plain", "avx2", "avx512", "avx512_bf16", "amx")  # in the order of kernels.c
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
TABLE4, LINEAR8, TABLE8 = range(3)


class _Weight(ctypes.Structure):
    """struct weight of kernels.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("packed", "absmax", "codebook")),
        *((name, ctypes.c_void_p) for name in ("nested_absmax", "offset", "nested_codebook")),
        *((name, ctypes.c_long) for name in ("rows", "columns")),
        *((name, ctypes.c_int) for name in ("log_block", "kind")),
    ]


class _AdamW(ctypes.Structure):
    """struct adamw of kernels.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("m_map", "v_map", "m_cells", "v_cells")),
        *((name, ctypes.c_float) for name in ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2")),
        *((name, ctypes.c_float) for name in ("keep", "step_size", "root", "eps")),
        *((name, ctypes.c_int) for name in ("m_zero", "v_zero")),
    ]


def open_library(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    pointer, long, whole = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    weight = ctypes.POINTER(_Weight)
    library.minift_dequantize.argtypes = [weight, pointer, whole, long, long, long, long, whole, whole]
    library.minift_quantize.argtypes = [pointer, whole, long, long, *[pointer] * 4, whole, whole]
    library.minift_matmul.argtypes = [weight, pointer, whole, long, pointer, whole, whole]
    library.minift_adamw.argtypes = [ctypes.POINTER(_AdamW), pointer, pointer, long, long, *[whole] * 3]
    library.minift_linear.argtypes = [*[pointer] * 4, long, long, long, whole, whole]
    library.minift_rms_norm.argtypes = [pointer, pointer, pointer, long, long, ctypes.c_float, *[whole] * 3]
    library.minift_attend.argtypes = [*[pointer] * 9, *[long] * 8, ctypes.c_float, *[whole] * 3]
    for name in ("dequantize", "quantize", "matmul", "adamw", "linear", "rms_norm", "attend"):
        getattr(library, f"minift_{name}").restype = None
    return library


def _load():
    """(library or None, level it runs at, one sentence about that)."""
    files = sorted((Path(__file__).parent / "cpu").glob("_kernels*.so"))
    if not files:
        return None, 0, "not built: install minift where a C compiler is (gcc 9 or later)"
    try:
        library = open_library(files[-1])
    except (OSError, AttributeError) as error:  # AttributeError: built from other sources
        return None, 0, f"{files[-1].name} does not load, install minift again: {error}"
    able = library.minift_level()
    asked = os.environ.get("MINIFT_CPU")
    if not asked:
        return library, able, f"{LEVELS[able]}, the best that this processor has of {', '.join(LEVELS)}"
    if asked not in LEVELS or LEVELS.index(asked) > able:
        raise ValueError(
            f"MINIFT_CPU is {asked!r}; this processor runs {', '.join(LEVELS[: able + 1])}: name one of them"
        )
    return library, LEVELS.index(asked), f"{asked}, named by MINIFT_CPU"


LIBRARY, LEVEL, WHY = _load()


def takes(tensor: torch.Tensor) -> bool:
    """Whether C can use a tensor's numbers; a fake or a distributed one has none in this place."""
    return tensor.is_cpu and type(tensor) in (torch.Tensor, torch.nn.Parameter) and not tensor.is_neg()


def address(tensor: torch.Tensor) -> int:
    """Where a tensor's numbers are."""
    if not takes(tensor):
        raise TypeError(f"the C file takes plain tensors, not {type(tensor).__name__}; use backend 'torch'")
    return tensor.data_ptr()


def _weight(weight: Packed) -> _Weight:
    """The struct; the tensors must live as long as the call."""
    rows, columns = weight.shape if len(weight.shape) == 2 else (1, 0)
    kind = TABLE4 if weight.bits == 4 else LINEAR8 if weight.codebook is None else TABLE8
    nested = weight.nested
    return _Weight(
        address(weight.packed),
        address(weight.absmax),
        None if weight.codebook is None else address(weight.codebook),
        address(weight.nested_absmax) if nested else None,
        address(weight.offset) if nested else None,
        address(weight.nested_codebook) if nested else None,
        rows,
        columns,
        weight.block_size.bit_length() - 1,
        kind,
    )


def dequantize(weight: Packed, out: torch.Tensor, first: int, stride: int) -> torch.Tensor:
    rows, columns = out.shape if stride else (1, out.numel())
    LIBRARY.minift_dequantize(
        _weight(weight),
        address(out),
        DTYPES[out.dtype],
        first,
        stride,
        rows,
        columns,
        LEVEL,
        torch.get_num_threads(),
    )
    return out


def quantize(w, block_size, midpoints, order, packed, absmax) -> None:
    """`midpoints` (16,) fp32, ascending, the last infinite, and `order` (16,) int32; None for int8."""
    LIBRARY.minift_quantize(
        address(w),
        DTYPES[w.dtype],
        w.numel(),
        block_size,
        None if midpoints is None else address(midpoints),
        None if order is None else address(order),
        address(packed),
        address(absmax),
        LEVEL,
        torch.get_num_threads(),
    )


def matmul(x: torch.Tensor, weight: Packed) -> torch.Tensor:
    """x (M, K) -> x W^T (M, N), in fp32."""
    y = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    LIBRARY.minift_matmul(
        _weight(weight), address(x), DTYPES[x.dtype], x.shape[0], address(y), LEVEL, torch.get_num_threads()
    )
    return y


def adamw(tensors, owner, blocks_each, dtype, maps, numbers) -> None:
    """`tensors` (tensors, 8) and `owner` (programs,) int64 as adamw_8bit.py lays them out for its kernel.

    numbers: beta1, 1 - beta1, beta2, 1 - beta2, keep, step_size, root, eps.
    """
    zeros = [int((map.values == 0).nonzero()) for map in maps]
    (m_map, m_cells), (v_map, v_cells) = maps
    pointers = (address(x) for x in (m_map, v_map, m_cells, v_cells))
    LIBRARY.minift_adamw(
        _AdamW(*pointers, *numbers, *zeros),
        address(tensors),
        address(owner),
        owner.numel(),
        blocks_each,
        DTYPES[dtype],
        LEVEL,
        torch.get_num_threads(),
    )


# For one token these are called hundreds of times: runtime.takes_c has looked at their tensors.


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., K), weight (N, K), bias (N,) or None -> (..., N); bf16, contiguous, x of at most 16 rows."""
    N, K = weight.shape
    y = x.new_empty(*x.shape[:-1], N)
    LIBRARY.minift_linear(
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        x.data_ptr(),
        y.data_ptr(),
        x.numel() // K,
        N,
        K,
        LEVEL,
        torch.get_num_threads(),
    )
    return y


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., D), weight (D,) -> (..., D); of one dtype, contiguous."""
    y, D = torch.empty_like(x), x.shape[-1]
    LIBRARY.minift_rms_norm(
        x.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        x.numel() // D,
        D,
        eps,
        DTYPES[x.dtype],
        LEVEL,
        torch.get_num_threads(),
    )
    return y


def attend(q, k, v, keys, values, length, cos, sin, mask) -> torch.Tensor:
    """As decode_attention.py says; of one dtype, contiguous, hd a multiple of 16."""
    B, KV, capacity, hd = keys.shape
    out = torch.empty_like(q)
    LIBRARY.minift_attend(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if cos is None else cos.data_ptr(),
        None if sin is None else sin.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        out.data_ptr(),
        None if mask is None else mask.data_ptr(),
        B,
        q.shape[-1] // hd,
        KV,
        hd,
        capacity,
        length,
        0 if cos is None or cos.shape[0] == 1 else hd,
        0 if mask is None or mask.shape[0] == 1 else length + 1,
        hd**-0.5,
        DTYPES[q.dtype],
        LEVEL,
        torch.get_num_threads(),
    )
    return out
