"""QuantizedLinear: y = x W^T + bias with W quantized, one class for every format.

The products are `matmul_4bit` and `matmul_int8` of minift.kernels, which keep the packed tensors alone for
the backward and give dx; what they promise about the numbers is there.
"""

import torch
from torch import nn

from minift.kernels.matmul_4bit import matmul_4bit
from minift.kernels.matmul_int8 import matmul_int8
from minift.kernels.packed import Packed
from minift.models.layers import Linear
from minift.quant.base import Layout
from minift.quant.weight import QuantizedWeight, as_packed, quantize_weight


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
        rows = x.to(self.compute_dtype).reshape(-1, self.in_features)
        matmul = matmul_4bit if self.layout.format.bits == 4 else matmul_int8
        y = matmul(rows.contiguous(), self.as_packed()).view(*x.shape[:-1], self.out_features)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.to(x.dtype)

    def as_packed(self) -> Packed:
        """The weight as the ops of minift.kernels take it, without a copy."""
        return as_packed(self.layout, self._parameters)

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
        layer = Linear(self.in_features, self.out_features, bias=False, device="meta")
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
