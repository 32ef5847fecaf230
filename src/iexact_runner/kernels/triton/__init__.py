"""The kernels for a GPU, compiled by Triton: same functions, signatures and bits as ``reference``."""

from iexact_runner.kernels.reference.spmm import sampled_matmul, spmm  # cuSPARSE
from iexact_runner.kernels.triton.blocks import decode_relu_dropout, gated_gradient, gated_sums, normalize_relu_dropout
from iexact_runner.kernels.triton.coefficients import dequantize_coefficients, quantize_coefficients
from iexact_runner.kernels.triton.elementwise import (
    apply_dropout_mask,
    dropout,
    dropout_mask,
    leaky_relu,
    leaky_relu_backward,
    leaky_relu_dropout,
    leaky_relu_dropout_backward,
    rademacher,
)
from iexact_runner.kernels.triton.product import quantize_product
from iexact_runner.kernels.triton.quantizer import dequantize, quantize
from iexact_runner.kernels.triton.signs import join_streams, pack_signs, unpack_signs

__all__ = [
    "apply_dropout_mask",
    "decode_relu_dropout",
    "dequantize",
    "dequantize_coefficients",
    "dropout",
    "dropout_mask",
    "gated_gradient",
    "gated_sums",
    "join_streams",
    "leaky_relu",
    "leaky_relu_backward",
    "leaky_relu_dropout",
    "leaky_relu_dropout_backward",
    "normalize_relu_dropout",
    "pack_signs",
    "quantize",
    "quantize_coefficients",
    "quantize_product",
    "rademacher",
    "sampled_matmul",
    "spmm",
    "unpack_signs",
]
