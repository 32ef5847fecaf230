"""The parity cases reach what they promise, and notice a difference of one bit."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from iexact_runner.kernels import parity, reference

CPU = torch.device("cpu")
FUNCTIONS = {
    "quantize": 3,
    "dequantize": 1,
    "leaky_relu": 2,
    "leaky_relu_backward": 1,
    "dropout_mask": 1,
    "apply_dropout_mask": 1,
    "dropout": 1,
    "leaky_relu_dropout": 2,
    "leaky_relu_dropout_backward": 1,
    "rademacher": 1,
    "normalize_relu_dropout": 2,
    "decode_relu_dropout": 1,
    "gated_sums": 1,
    "gated_gradient": 1,
    "quantize_product": 3,
    "quantize_coefficients": 1,
    "dequantize_coefficients": 1,
    "pack_signs": 2,
    "join_streams": 1,
    "unpack_signs": 2,
    "spmm": 1,
    "sampled_matmul": 1,
}
RESULTS = [(function, position) for function, count in FUNCTIONS.items() for position in range(count)]


@pytest.mark.parametrize("quick", [True, False])
def test_cases_reach_every_function_width_and_type(quick: bool) -> None:
    seen: dict[str, set[Any]] = {"function": set(), "bits": set(), "quantized": set(), "dtype": set(), "levels": set()}
    for case in parity.cases(quick=quick):
        seen["function"].add(case.function)
        if case.function == "quantize":
            seen["bits"].add(case.options["bits"])
            seen["levels"].add(case.options["levels"] is None)
            seen["quantized"].add(case.tensors[0].dtype)
        elif case.function == "dropout":
            seen["dtype"].add(case.tensors[0].dtype)
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    expected = {"bits": {1, 2, 4, 8}, "quantized": dtypes, "dtype": dtypes, "levels": {True, False}}
    assert seen == {"function": set(FUNCTIONS), **expected}


def test_quick_cases_are_few() -> None:
    assert sum(1 for _ in parity.cases(quick=True)) <= 75


def test_reference_equals_itself() -> None:
    assert parity.mismatches(reference, CPU, parity.cases(quick=True)) == []


@pytest.mark.parametrize(("function", "position"), RESULTS, ids=[f"{name}-{index}" for name, index in RESULTS])
def test_one_flipped_bit_is_noticed(function: str, position: int) -> None:
    found = parity.mismatches(_mutant(function, position), CPU, parity.cases(quick=True))
    assert found
    assert all(line.startswith(f"{function}[") and f"result {position}" in line for line in found)
    assert all("1 of " in line for line in found)


def test_another_shape_type_or_count_is_noticed() -> None:
    for change, words in [
        (lambda y: y[None], "shape"),
        (lambda y: y.double(), "dtype"),
        (lambda y: (y, y), "2 tensors instead of 1"),
    ]:
        module = _copy()
        module.dropout = lambda *args, change=change, **options: change(reference.dropout(*args, **options))  # type: ignore[attr-defined]
        found = parity.mismatches(module, CPU, parity.cases(quick=True))
        assert len(found) == 3
        assert all(words in line for line in found)


@pytest.mark.parametrize(("function", "bits_count"), [("quantize", True), ("leaky_relu", False)])
def test_bits_of_a_nan_count_in_what_is_stored_alone(function: str, bits_count: bool) -> None:
    """Zero and scale of a block with a NaN are kept bytes, whose every bit is compared."""

    def renamed(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        results = [tensor.clone() for tensor in getattr(reference, function)(*args, **options)]
        for tensor in results:
            if tensor.is_floating_point():
                integers = tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)
                integers[tensor.isnan()] ^= 1
        return tuple(results)

    x = torch.tensor([1.0, torch.nan, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    blocks = {"bits": 2, "block_size": 8, "levels": None, "seed": 1}
    options = blocks if function == "quantize" else {"negative_slope": 0.1}
    module = _copy()
    setattr(module, function, renamed)
    found = parity.mismatches(module, CPU, [parity.Case(function, (x,), options, "nan")])
    assert bool(found) is bits_count, found


def _mutant(function: str, position: int) -> ModuleType:
    """The reference, with the lowest bit of the last element of one result of one function flipped."""

    def mutated(*args: Any, **options: Any) -> Any:
        result = getattr(reference, function)(*args, **options)
        tensors = [*result] if isinstance(result, tuple) else [result]
        tensors[position] = _flip(tensors[position])
        return tuple(tensors) if isinstance(result, tuple) else tensors[0]

    module = _copy()
    setattr(module, function, mutated)
    return module


def _copy() -> ModuleType:
    module = ModuleType("mutant")
    for function in FUNCTIONS:
        setattr(module, function, getattr(reference, function))
    return module


def _flip(tensor: Tensor) -> Tensor:
    flipped = tensor.clone(memory_format=torch.contiguous_format)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    flipped.view(integers).view(-1)[-1] ^= 1
    return flipped
