"""Block quantization: FORMATS, quantize_weight, quantize_model."""

from minift.quant.model import Quantization, quantize_model
from minift.quant.weight import FORMATS, QuantizedWeight, quantize_weight

__all__ = ["FORMATS", "Quantization", "QuantizedWeight", "quantize_model", "quantize_weight"]
