"""The custom operators: registered as torch expects, and nothing but the backend's own functions."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from iexact_runner.kernels import backends, block_ops, ops, reference, sketch_ops, sparse_ops

X = torch.randn(37, 63)
SEED = torch.tensor(7)
MASK = reference.pack((X > 0).flatten().byte(), 1)
CODES = reference.quantize(X, bits=4, block_size=63, levels=None, seed=7)
VECTOR, COEFFICIENTS, DIRECTIONS = torch.randn(63), torch.randn(37, 8), torch.randn(63, 8)
LEVELS = [0.0, 0.7, 2.3, 3.0]
BITS = torch.tensor([5, 4, 4, 3, 3, 2, 1, 0], dtype=torch.int32)
MAP_CODES = sketch_ops.quantize_coefficients(COEFFICIENTS, BITS, width=24, seed=None, backend="torch")
SKETCH = (COEFFICIENTS, DIRECTIONS, VECTOR, VECTOR.abs())
STREAMS = reference.pack_signs(MASK, *SKETCH, exact=True, p=0.3, seed=7)
OFFSETS, COLUMNS = torch.arange(0, 2 * 38, 2, dtype=torch.int32), torch.randint(37, (74,), dtype=torch.int32)
SCALE, ENTRIES = torch.rand(37, 1), torch.randn(74)

CALLS = {
    "quantize": (ops._quantize, (X, 4, 63, None, SEED, 0, "torch")),
    "quantize levels": (ops._quantize, (X, 2, 100, LEVELS, SEED, 16, "torch")),
    "quantize bfloat16": (ops._quantize, (X.bfloat16(), 8, 7, None, SEED, 0, "torch")),
    "dequantize": (ops._dequantize, (*CODES, 4, 63, None, [37, 63], torch.float32, "torch")),
    "leaky_relu": (ops._leaky_relu, (X, 0.1, "torch")),
    "leaky_relu_backward": (ops._leaky_relu_backward, (X, MASK, 0.1, "torch")),
    "dropout": (ops._dropout, (X, 0.3, SEED, 0, "torch")),
    "dropout_mask": (ops._dropout_mask, (X, 0.3, SEED, 5, "torch")),
    "apply_dropout_mask": (ops._apply_dropout_mask, (X, MASK, 0.3, "torch")),
    "leaky_relu_dropout": (ops._leaky_relu_dropout, (X, 0.0, 0.3, SEED, 0, "torch")),
    "leaky_relu_dropout_backward": (ops._leaky_relu_dropout_backward, (X, MASK, 0.0, 0.3, SEED, 0, "torch")),
    "normalize_relu_dropout": (block_ops._normalize_relu_dropout, (X, *[VECTOR] * 4, 0.3, SEED, 0, "torch")),
    "decode_relu_dropout": (
        block_ops._decode_relu_dropout,
        (COEFFICIENTS, DIRECTIONS, VECTOR, MASK, 0.3, SEED, 0, "torch"),
    ),
    "decode_relu_dropout no relu": (
        block_ops._decode_relu_dropout,
        (COEFFICIENTS, DIRECTIONS, VECTOR, None, 0.0, SEED, 8, "torch"),
    ),
    "decode_relu_dropout columns": (
        block_ops._decode_relu_dropout,
        (X, VECTOR, VECTOR, MASK, 0.3, SEED, 0, "torch"),
    ),
    "gated_sums": (block_ops._gated_sums, (X, MASK, COEFFICIENTS, DIRECTIONS, 0.3, SEED, 8, "torch")),
    "gated_gradient": (
        block_ops._gated_gradient,
        (X.bfloat16(), MASK, COEFFICIENTS, DIRECTIONS, VECTOR, VECTOR, 0.3, SEED, 0, "torch"),
    ),
    "quantize_product": (block_ops._quantize_product, (X, DIRECTIONS, VECTOR[:8], 4, 16, None, SEED, "torch")),
    "quantize_coefficients": (sketch_ops._quantize_coefficients, (COEFFICIENTS, BITS, 24, None, "torch")),
    "quantize_coefficients by chance": (sketch_ops._quantize_coefficients, (COEFFICIENTS, BITS, 24, SEED, "torch")),
    "dequantize_coefficients": (sketch_ops._dequantize_coefficients, (MAP_CODES, BITS, "torch")),
    "pack_signs": (sketch_ops._pack_signs, (MASK, *SKETCH, True, 0.3, SEED, 16, "torch")),
    "join_streams": (sketch_ops._join_streams, (*STREAMS, 50, "torch")),
    "unpack_signs": (
        sketch_ops._unpack_signs,
        (reference.join_streams(*STREAMS, capacity=400), STREAMS[1], *SKETCH, True, 0.3, SEED, 16, "torch"),
    ),
    "rademacher": (ops._rademacher, (X, 63, 8, SEED, "torch")),
    "normalize_relu_dropout_": (
        block_ops._normalize_relu_dropout_,
        (X.clone(), *[VECTOR] * 4, 0.3, SEED, 0, "torch"),
    ),
    "gated_gradient_": (
        block_ops._gated_gradient_,
        (X.clone(), MASK, COEFFICIENTS, DIRECTIONS, VECTOR, VECTOR, 0.3, SEED, 0, "torch"),
    ),
    "spmm": (sparse_ops._spmm, (OFFSETS, COLUMNS, X, None, SCALE, None, VECTOR)),
    "spmm_into": (sparse_ops._spmm_into, (OFFSETS, COLUMNS, X, ENTRIES, None, SCALE, None, X.clone(), True)),
    "sampled_matmul": (sparse_ops._sampled_matmul, (OFFSETS, COLUMNS, X, X)),
}


@pytest.mark.parametrize("name", CALLS)
def test_operator_is_registered_soundly(name):
    """Schema, fake implementation and dispatch agree with what the operator really returns."""
    operator, arguments = CALLS[name]
    torch.library.opcheck(
        operator, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_every_operator_is_checked():
    values = [value for module in (ops, block_ops, sketch_ops, sparse_ops) for value in vars(module).values()]
    defined = {value for value in values if isinstance(value, torch._ops.OpOverload)}
    assert defined == {operator for operator, _ in CALLS.values()}


def test_autograd_notices_that_a_saved_map_was_written_over():
    weight, saved = torch.ones(37, 63, requires_grad=True), X.clone()
    product = weight * saved
    block_ops.normalize_relu_dropout(saved, *[VECTOR] * 4, p=0.3, seed=7, backend="torch", overwrite=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_what_has_no_gradient_is_refused_where_one_is_recorded():
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="^iexact::dropout has no gradient"):
        ops.dropout(x, p=0.5, seed=1, backend="auto")
    with torch.no_grad():
        kept = ops.dropout(x, p=0.5, seed=1, backend="auto")
    torch.testing.assert_close(kept, ops.dropout(x.detach(), p=0.5, seed=1, backend="auto"), rtol=0, atol=0)


def test_strides_are_ironed_out():
    x = torch.randn(20, 30).t()
    assert ops.leaky_relu(x, negative_slope=0.0, backend="torch")[0].is_contiguous()
    assert ops.dropout(x, p=0.5, seed=1, backend="torch").is_contiguous()
    assert torch.equal(ops.dropout(x, p=0.5, seed=1, backend="torch"), reference.dropout(x.contiguous(), p=0.5, seed=1))


def test_quantize_goes_on_at_an_offset_of_the_draws():
    expected = reference.quantize(X, bits=2, block_size=100, levels=tuple(LEVELS), seed=7, offset=16)
    actual = ops.quantize(X, bits=2, block_size=100, levels=tuple(LEVELS), seed=7, backend="torch", offset=16)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], ops._quantize(X, 2, 100, LEVELS, SEED, 0, "torch")[0])


def test_a_seed_is_written_where_it_is_needed():
    """Of a copy from the host a GPU would be waited for, once a call."""
    assert ops.seed_tensor(-5, torch.device("meta")).device.type == "meta"
    assert torch.equal(ops.seed_tensor(-(1 << 63), X.device), torch.tensor(-(1 << 63)))
    assert ops.seed_tensor(SEED, torch.device("meta")) is SEED


@pytest.mark.parametrize("count", [0, 1, 37, 4099])
def test_mask_of_edges_is_that_of_the_reference(count):
    mask = ops.keep_mask(count, p=0.3, seed=-11, device=X.device)
    assert torch.equal(mask, reference.keep_mask(count, p=0.3, seed=-11, device=X.device))


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_written_over_a_map_is_what_would_be_a_new_one(backend, dtype):
    x = X.to(dtype)
    options = dict(p=0.3, seed=7, backend=backend)
    expected, mask = block_ops.normalize_relu_dropout(x, *[VECTOR] * 4, **options)
    place = x.clone()
    found, found_mask = block_ops.normalize_relu_dropout(place, *[VECTOR] * 4, **options, overwrite=True)
    assert found is place and torch.equal(found, expected) and torch.equal(found_mask, mask)
    factors = (MASK, COEFFICIENTS, DIRECTIONS, VECTOR, VECTOR)
    expected, place = block_ops.gated_gradient(x, *factors, **options), x.clone()
    found = block_ops.gated_gradient(place, *factors, **options, overwrite=True)
    assert found is place and torch.equal(found, expected)
    # A map whose rows are apart is left as it is.
    apart = torch.cat([x, x], dim=1)[:, :63]
    assert block_ops.gated_gradient(apart, *factors, **options, overwrite=True) is not apart
    assert torch.equal(apart, x)


@pytest.mark.parametrize("name", ["torch", "auto"])
def test_a_product_is_written_to_columns_of_a_wider_map(name):
    kernels = backends.select(name, X.device)
    wide, expected = torch.zeros(37, 100), kernels.spmm(OFFSETS, COLUMNS, X)
    kernels.spmm(OFFSETS, COLUMNS, X, out=wide[:, 5:68])
    assert torch.equal(wide[:, 5:68], expected)
    assert not wide[:, :5].any() and not wide[:, 68:].any()


def test_entries_of_the_same_place_are_added_up():
    offsets, columns = torch.tensor([0, 9, 9, 12]), torch.tensor([0, 1, 1, 0, 0, 2, 1, 1, 1, 2, 2, 0])
    values = torch.arange(12.0)
    spmm = import_module("iexact_runner.kernels.reference.spmm")  # whose name the function has
    matrix = spmm.csr_tensor(offsets, columns, values, width=4)
    dense = spmm.summed(matrix)
    expected = torch.zeros(3, 4)
    for row, column, value in zip([0] * 9 + [2] * 3, columns.tolist(), values.tolist(), strict=True):
        expected[row, column] += value
    assert torch.equal(dense, expected) and dense.dtype == torch.float32


def test_rows_of_a_larger_map_draw_from_their_place_in_it():
    """Also where what is at hand is a vector as long as the map is wide."""
    seed = ops.RowSeed.of(3, 5)
    assert [ops.row_offset(seed, torch.empty(shape)) for shape in ((63,), (2, 63), (2, 3, 63))] == [5 * 63] * 3
    assert ops.row_offset(3, X) == ops.row_offset(torch.tensor(3), X) == 0
