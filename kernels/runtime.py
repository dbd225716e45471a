"""Which implementation of an op runs, and why: Triton on GPUs, the C file on CPUs, plain torch anywhere.

`auto` takes the first one that is there. A backend that is asked for by name and is not there is an error:

    with runtime.using("torch"):
        y = matmul_4bit(x, weight)

So is a path: products with a quantized matrix are "fused" or go through "slabs" (kernels/slabs.py), by rules
that `using(path=...)` overrides. What runs is the same in every run, launch configurations too, unless
`using(deterministic=False)` lets launchers time a few and keep the fastest.

Triton kernels run on CPU tensors in Triton's interpreter, in a process started with TRITON_INTERPRET=1. It
computes bf16 wrongly and has no inline assembly: kernels take the dtype of their products and the way they
decode as arguments, `dot_dtype(x)` and `DECODE`, and run one configuration.
"""

import os
from contextlib import contextmanager

import torch

from minift.kernels import library

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
        dtype = None

        @staticmethod
        def constexpr(value):
            return value


BACKENDS = ("auto", "triton", "c", "torch")
PATHS = ("fused", "slabs")
INTERPRETED = triton.__version__ is not None and os.environ.get("TRITON_INTERPRET") == "1"
DECODE = "gather" if INTERPRETED or torch.version.hip else "prmt"

_state = {"backend": os.environ.get("MINIFT_BACKEND") or "auto", "path": None, "deterministic": True}
if _state["backend"] not in BACKENDS:
    raise ValueError(f"MINIFT_BACKEND is {_state['backend']!r}; known backends: {', '.join(BACKENDS)}")


@contextmanager
def using(backend: str | None = None, path: str | None = None, deterministic: bool | None = None):
    """Within the block, ops run so, or raise where they cannot; None leaves a choice as it is."""
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend {backend!r} is not known; known backends: {', '.join(BACKENDS)}")
    if path not in (None, *PATHS):
        raise ValueError(f"path {path!r} is not known; known paths: {', '.join(PATHS)}")
    before = dict(_state)
    asked = {"backend": backend, "path": path, "deterministic": deterministic}
    _state.update({name: value for name, value in asked.items() if value is not None})
    try:
        yield
    finally:
        _state.update(before)


def setting(name: str):
    """The backend, the path (None: as the rules say) or the determinism that `using` asked for."""
    return _state[name]


def missing(backend: str, device: torch.device, has: tuple[str, ...]) -> str | None:
    """Why a backend cannot run an op, which has the implementations `has`, on a device; None if it can."""
    if backend not in has:
        return f"the op has {', '.join(has)}"
    if backend == "triton":
        if triton.__version__ is None:
            return "Triton is not installed"
        if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
            return f"Triton runs on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1; got {device}"
    if backend == "c" and device.type != "cpu":
        return f"the C file runs on CPU tensors; got {device}"
    if backend == "c" and library.LIBRARY is None:
        return f"the C file is {library.WHY}"
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


def takes_c(op: str, *tensors: torch.Tensor) -> bool:
    """Whether the C file runs an op that is torch's elsewhere: on GPUs, and where gradients are recorded.

    Raises where C was asked for, no gradients are recorded, and it cannot run.
    """
    asked = _state["backend"]
    if asked in ("triton", "torch") or torch.is_grad_enabled():
        return False
    if asked == "c":
        choose(op, tensors[0].device, ("c",))
        return all(map(library.address, tensors))
    return library.LIBRARY is not None and all(map(library.takes, tensors))


def dot_dtype(x: torch.Tensor):
    """The Triton dtype of the operands of tl.dot for x: its own, or fp32 in the interpreter."""
    if INTERPRETED or x.dtype == torch.float32:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype]
