"""Compressed storage of activation maps: knows tensors, not gradients or networks."""

from iexact_runner.compression.codec import Quantized, dequantize, quantize

__all__ = ["Quantized", "dequantize", "quantize"]
