"""Weights in the forms that the sides take, and how large they are."""

from functools import cache, partial
from itertools import cycle

import torch

from benchmarks.limits import DEVICE, l2_bytes
from minift.kernels.packed import Packed
from minift.quant import quantize_weight

SHAPES = ((4096, 4096), (11008, 4096), (28672, 8192))  # N, K; a CPU has the first two
BLOCK_SIZE = 64


def shapes(quick: bool) -> tuple:
    if DEVICE == "cuda":
        return SHAPES[:1] if quick else SHAPES
    return ((1024, 1024),) if quick else SHAPES[:2]


def row_counts(quick: bool) -> tuple:
    """M of a product; from 256 on, its backward is timed as well."""
    if DEVICE == "cuda":
        return (1, 16, 256, 4096) if quick else (1, 4, 16, 64, 256, 1024, 4096)
    return (1, 16, 256) if quick else (1, 4, 16, 64, 256, 512)


def dtypes(quick: bool) -> tuple:
    return (torch.bfloat16,) if DEVICE == "cuda" or quick else (torch.float32, torch.bfloat16)


def labels(op: str, weight: torch.Tensor, /, **more) -> dict:
    """The first columns of a row."""
    size = " x ".join(map(str, weight.shape))
    return {"op": op, "N x K": size, "dtype": str(weight.dtype).removeprefix("torch."), **more}


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def pack(weight: torch.Tensor, format: str, double_quant: bool) -> Packed:
    return quantize_weight(weight, format, BLOCK_SIZE, double_quant).as_packed()


def nbytes(*weights) -> int:
    """Bytes of tensors and of the tensors of a Packed."""
    tensors = [t for w in weights for t in (w if isinstance(w, Packed) else (w,))]
    return sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))


def copies(weight) -> list:
    """A tensor or a Packed as often as it takes to be more than twice the L2 cache; on a CPU, once."""
    count = 2 * l2_bytes() // nbytes(weight) + 1 if DEVICE == "cuda" else 1
    if isinstance(weight, torch.Tensor):
        return [weight, *(weight.clone() for _ in range(count - 1))]
    fields = [[t.clone() if isinstance(t, torch.Tensor) else t for t in weight] for _ in range(count - 1)]
    return [weight, *(Packed(*clone) for clone in fields)]


def into(op, sources: list, out: torch.Tensor) -> list:
    """Calls that fill copies of `out` in turn."""
    return [partial(op, source, out=each) for source, each in zip(sources, cycle(copies(out)), strict=False)]


def fresh(op, source, out: torch.Tensor) -> list:
    """A call that allocates its result, which on a CPU costs the page faults of new memory."""
    return [lambda: op(source, out=torch.empty_like(out))]


@cache
def linear_map() -> torch.Tensor:
    """minift's 255 numbers of 8 bits, and one of them again, as bitsandbytes takes them."""
    return torch.arange(-128, 128, device=DEVICE).clamp(min=-127) / 127


def int8_of(w: torch.Tensor):
    """bitsandbytes' blockwise quantization to those numbers: (bytes, state)."""
    import bitsandbytes.functional as bnb

    return bnb.quantize_blockwise(w, code=linear_map(), blocksize=BLOCK_SIZE)


def linear4bit(weight: torch.Tensor, double_quant: bool, train: bool):
    """bitsandbytes' layer. On a CPU its first call after eval() repacks the weight for good."""
    import bitsandbytes as bnb

    options = {"quant_type": "nf4", "compress_statistics": double_quant, "blocksize": BLOCK_SIZE}
    N, K = weight.shape
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, device="meta")
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **options)
    return layer.to(DEVICE).train(train)


def stands_for(layer) -> torch.Tensor:
    """The matrix of bitsandbytes' layer, in its compute dtype."""
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
