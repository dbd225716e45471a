"""Which implementation of an op runs, and why: Triton on GPUs, the C file on CPUs, plain torch anywhere.

`auto` takes the first one that is there. A backend that is asked for by name and is not there is an error:

    with runtime.using("torch"):
        y = matmul_4bit(x, weight)

Triton kernels run on CPU tensors in Triton's interpreter, in a process started with TRITON_INTERPRET=1. It
computes bf16 wrongly and has no inline assembly: kernels take the dtype of their products and the way they
decode as arguments, `dot_dtype(x)` and `DECODE`, and run one configuration.
"""

import os
from contextlib import contextmanager

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # not on Linux

    class triton:
        __version__ = None

        @staticmethod
        def jit(kernel):
            return kernel

    class tl:
        constexpr = dtype = None


BACKENDS = ("auto", "triton", "c", "torch")
INTERPRETED = triton.__version__ is not None and os.environ.get("TRITON_INTERPRET") == "1"
DECODE = "gather" if INTERPRETED else "prmt"

_state = {"backend": os.environ.get("MINIFT_BACKEND", "auto")}


@contextmanager
def using(backend: str):
    """Within the block, ops run on this backend, or raise where they do not have it."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known; known backends: {', '.join(BACKENDS)}")
    before = _state["backend"]
    _state["backend"] = backend
    try:
        yield
    finally:
        _state["backend"] = before


def missing(backend: str, device: torch.device, has: tuple[str, ...]) -> str | None:
    """Why a backend cannot run an op, which has the implementations `has`, on a device; None if it can."""
    if backend not in has:
        return f"the op has {', '.join(has)}"
    if backend == "triton":
        if triton.__version__ is None:
            return "Triton is not installed"
        if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
            return f"Triton runs on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1; got {device}"
    return None


def choose(op: str, device: torch.device, has: tuple[str, ...]) -> str:
    """The backend that runs `op` on tensors of a device: the first of `has` that can, or the asked one."""
    asked = _state["backend"]
    if asked == "auto":
        return next(backend for backend in has if missing(backend, device, has) is None)
    reason = missing(asked, device, has)
    if reason:
        raise RuntimeError(f"{op}: backend {asked!r} was asked for and cannot run: {reason}")
    return asked


def dot_dtype(x: torch.Tensor):
    """The Triton dtype of the operands of tl.dot for x: its own, or fp32 in the interpreter."""
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
