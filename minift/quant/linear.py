"""QuantizedLinear: y = x W^T + bias with W quantized, one class for every format.

Forward and backward dequantize a slab of W (SLAB elements) into one buffer and multiply by it: rows of W for
y = x W^T, columns for dx = dy W, so that no product is split along its sum and the numbers are those of a
dense layer with the dequantized weight. Columns are whole blocks only where in_features % block_size == 0;
otherwise the backward dequantizes W whole, once.
"""

from math import gcd

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from minift.quant.base import Layout
from minift.quant.blocks import decode, decode_flat
from minift.quant.weight import QuantizedWeight, quantize_weight

SLAB = 2**22  # elements of W that exist dequantized at a time


def matmul(x: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """x (M, K) times W^T, W (N, K) rounded to x's dtype -> (M, N)."""
    (N, K), layout = weight.shape, weight.layout
    size, bits = layout.block_size, layout.format.bits
    unit = size // gcd(K, size)  # rows that are whole blocks together
    step = min(N, max(unit, SLAB // K // unit * unit))
    scales = weight.scales()
    y = x.new_empty(x.shape[0], N)
    buffer = x.new_empty(step * K)
    for start in range(0, N, step):
        stop = min(N, start + step)
        a, b = start * K, stop * K
        packed = weight.packed[a * bits // 8 : -(-b * bits // 8)]
        slab = decode_flat(packed, scales[a // size : -(-b // size)], layout.format, size, buffer[: b - a])
        torch.mm(x, slab.view(-1, K).t(), out=y[:, start:stop])
    return y


def matmul_backward(dy: torch.Tensor, weight: QuantizedWeight) -> torch.Tensor:
    """dy (M, N) times W, W (N, K) rounded to dy's dtype -> dx (M, K)."""
    (N, K), layout = weight.shape, weight.layout
    size, bits = layout.block_size, layout.format.bits
    if K % size:
        return dy @ weight.dequantize(dy.dtype)
    step = min(K, max(size, SLAB // N // size * size))
    packed, scales = weight.packed.view(N, -1), weight.scales().view(N, -1)
    lookup = layout.format.lookup(dy.device)
    dx = dy.new_empty(dy.shape[0], K)
    buffer = dy.new_empty(N * step)
    for start in range(0, K, step):
        stop = min(K, start + step)
        codes = packed[:, start * bits // 8 : stop * bits // 8]
        slab = buffer[: N * (stop - start)].view(N, -1)
        decode(codes, scales[:, start // size : stop // size], lookup, slab)
        torch.mm(dy, slab, out=dx[:, start:stop])
    return dx


class QuantizedMatmul(torch.autograd.Function):
    """x (..., K) -> (..., N). Keeps the packed tensors for the backward, which gives dx alone."""

    @staticmethod
    def forward(ctx, x, layout, *tensors):
        ctx.layout = layout
        ctx.save_for_backward(*tensors)
        weight = QuantizedWeight(layout, dict(zip(layout.sizes(), tensors, strict=True)), x.dtype)
        return matmul(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], layout.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        layout = ctx.layout
        weight = QuantizedWeight(layout, dict(zip(layout.sizes(), ctx.saved_tensors, strict=True)), dy.dtype)
        dx = matmul_backward(dy.reshape(-1, dy.shape[-1]), weight).view(*dy.shape[:-1], layout.shape[1])
        return dx, None, *[None] * len(ctx.saved_tensors)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is quantized and frozen.

    Parameters: the tensors of `Layout.sizes`, uint8, and the bias. x is rounded to `compute_dtype` for the
    product and the result to x's dtype. Built from shapes, without numbers, so it works on the meta device;
    `quantize_` and `from_weight` give it numbers.
    """

    def __init__(
        self, layout: Layout, compute_dtype: torch.dtype, bias: nn.Parameter | None = None, device=None
    ):
        super().__init__()
        self.out_features, self.in_features = layout.shape
        self.layout, self.compute_dtype = layout, compute_dtype
        for name, size in layout.sizes().items():
            empty = torch.empty(size, dtype=torch.uint8, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))
        self.bias = bias

    @classmethod
    def from_weight(cls, weight: QuantizedWeight, compute_dtype=None, bias=None) -> "QuantizedLinear":
        if len(weight.shape) != 2:
            raise ValueError(f"a linear layer needs a matrix; the quantized weight has shape {weight.shape}")
        layer = cls(weight.layout, compute_dtype or weight.dtype, bias, device="meta")
        for name, tensor in weight.tensors.items():
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
        return layer

    def forward(self, x):
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the layer takes {self.in_features} features; x has shape {tuple(x.shape)}")
        tensors = [getattr(self, name) for name in self.layout.sizes()]
        y = QuantizedMatmul.apply(x.to(self.compute_dtype), self.layout, *tensors)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def quantized(self) -> QuantizedWeight:
        """The weight as it is stored, without a copy."""
        tensors = {name: getattr(self, name).detach() for name in self.layout.sizes()}
        return QuantizedWeight(self.layout, tensors, self.compute_dtype)

    def dequantize(self) -> torch.Tensor:
        """W (out, in) in the compute dtype, as the products use it."""
        return self.quantized().dequantize()

    def quantize_(self, weight: torch.Tensor) -> None:
        """Quantize another matrix (out, in) into this layer, in its format."""
        if tuple(weight.shape) != self.layout.shape:
            raise ValueError(f"the layer's weight is {self.layout.shape}, not {tuple(weight.shape)}")
        for name, tensor in self.requantized(weight).quantized().tensors.items():
            getattr(self, name).data.copy_(tensor)

    def requantized(self, weight: torch.Tensor) -> "QuantizedLinear":
        """A layer as this one, the bias shared, with another matrix in the same format."""
        layout = self.layout
        new = quantize_weight(weight, layout.format.name, layout.block_size, layout.double_quant)
        return QuantizedLinear.from_weight(new, self.compute_dtype, self.bias).train(self.training)

    def dense(self, weight: torch.Tensor) -> nn.Linear:
        """A dense layer as this one, the bias shared, with another matrix in the compute dtype."""
        layer = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.to(self.compute_dtype), requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            raise ValueError(
                f"a {self.layout.format.name} weight has no gradient: its codes are integers; train an "
                "adapter on it, or load the model without quantization"
            )
        return super().requires_grad_(False)

    def extra_repr(self):
        layout = self.layout
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {layout.format.name}, "
            f"block_size={layout.block_size}, double_quant={layout.double_quant}, {self.compute_dtype}"
        )
