"""LoftQ: quantize a weight together with the branch that will stand on it.

    A_0, B_0 = 0;   Q_t = q(W - s B_{t-1} A_{t-1}),   s B_t A_t = the best rank-r approximation of W - Q_t

for t = 1 to T, with s the scaling of LoRA. The layer becomes Q_T, quantized, with a plain LoRA that starts
at A_T, B_T. Q_1 is q(W) itself, and with its branch it is nearer to W. No more is certain: q rounds to the
nearest codes and not to the least error of all blocks, so the error may rise with t, and `loftq_table` says
whether it does.
Source: Li et al. 2023, arXiv:2310.08659, algorithm 1.
"""

import torch

from minift.methods.low_rank import LoRALinear
from minift.methods.pissa import principal
from minift.methods.plan import aligned
from minift.models.adapters import Adapter
from minift.quant import Quantization, quantize_weight
from minift.quant.linear import QuantizedLinear
from minift.quant.weight import QuantizedWeight


def loftq(
    W: torch.Tensor, r: int, scaling: float, recipe: Quantization, iterations: int
) -> tuple[QuantizedWeight, torch.Tensor, torch.Tensor, list[float]]:
    """W (out, in) -> (Q_T, A (r, in), B (out, r), the errors |W - Q_t - s B_t A_t|, Frobenius, t = 0 to T).

    The first error, of t = 0, is |W - q(W)|. Q_t is taken as the products use it, rounded to W's dtype.
    """
    W = W.detach()
    wide, target, errors = W.float(), W, []
    for _ in range(iterations):
        Q = quantize_weight(target, recipe.format, recipe.block_size, recipe.double_quant)
        rest = wide - Q.dequantize(W.dtype).float()  # (out, in)
        A, B = principal(rest, r, scaling)
        delta = scaling * (B @ A)
        errors += [_norm(rest)] * (not errors) + [_norm(rest - delta)]
        target = wide - delta
    return QuantizedWeight(Q.layout, Q.tensors, W.dtype), A, B, errors


def start_loftq(layer: LoRALinear, W: torch.Tensor, recipe: Quantization, iterations: int) -> None:
    """Start a branch on a quantized layer as LoftQ does; W (out, in) is the layer's dense weight."""
    Q, A, B, errors = loftq(W, layer.r, layer.scaling, recipe, iterations)
    base = layer.base
    layer.base = QuantizedLinear.from_weight(Q, base.compute_dtype, base.bias).train(base.training)
    layer.lora_A.data.copy_(A)
    layer.lora_B.data.copy_(B)
    size = _norm(W.detach()) or 1.0
    layer.loftq_errors = [error / size for error in errors]


def loftq_table(adapter: Adapter) -> str:
    """The errors of `model.adapters[name]` relative to |W|: quantized alone, then after each iteration."""
    found = {path: getattr(layer, "loftq_errors", ()) for path, layer in adapter.modules.items()}
    rows = [(path, *(f"{error:.5f}" for error in errors)) for path, errors in found.items() if errors]
    columns = max(map(len, rows), default=2)
    return aligned([("module", "q(W)", *map(str, range(1, columns - 1))), *rows], right=range(1, columns))


def _norm(matrix: torch.Tensor) -> float:
    return torch.linalg.vector_norm(matrix, dtype=torch.float64).item()
