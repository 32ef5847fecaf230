from __future__ import annotations

import dataclasses

import pytest
import torch

from iexact_runner.compression import dequantize, quantize
from iexact_runner.compression.codec import check_levels


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (7,), (63,), (100,), (37, 63), (4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_tensor_has_shape_type_and_known_bytes(shape, dtype):
    x = torch.randn(shape).to(dtype)
    kept = quantize(x, bits=4, block_size=10, seed=0)
    decoded = dequantize(kept)
    assert decoded.shape == x.shape and decoded.dtype == dtype
    assert kept.nbytes == -(-x.numel() * 4 // 8) + 4 * -(-x.numel() // 10)
    if x.numel():
        assert (decoded.float() - x.float()).abs().max() <= kept.scale.float().max() * 1.01 + 1e-2


def test_strides_do_not_matter():
    x = torch.randn(20, 30).t()
    for view in (x, torch.randn(40, 60)[::2, 1::3]):
        kept, expected = (quantize(v, bits=2, block_size=16, seed=1) for v in (view, view.contiguous()))
        assert torch.equal(kept.codes, expected.codes) and torch.equal(dequantize(kept), dequantize(expected))


def test_input_needs_no_gradient_and_stays_as_it_was():
    x = torch.randn(10, requires_grad=True)
    before = x.detach().clone()
    kept = quantize(x, bits=2, block_size=4, seed=1)
    assert not dequantize(kept).requires_grad and torch.equal(x.detach(), before)


def test_codes_do_not_depend_on_block_size_beyond_their_scale():
    """Same element, same seed, same random number: with equal scales the codes agree."""
    x = torch.tensor([0.0, 1.0, 0.3, 0.7] * 16)
    small, large = (quantize(x, bits=2, block_size=size, seed=5) for size in (4, 64))
    assert torch.equal(small.codes, large.codes)


def test_int_and_tensor_seeds_agree():
    x = torch.randn(100)
    assert torch.equal(
        quantize(x, bits=2, block_size=10, seed=-5).codes,
        quantize(x, bits=2, block_size=10, seed=torch.tensor(-5)).codes,
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 3}, "bits=3: must be one of 1, 2, 4, 8"),
        ({"block_size": 0}, "block_size=0: must be an int of 1 or more"),
        ({"block_size": 1.5}, "block_size=1.5"),
        ({"block_size": 2**70}, "below 2**63"),
        ({"bits": True}, "bits=True: must be one of 1, 2, 4, 8"),
        ({"bits": 2.0}, "bits=2.0"),
        ({"seed": 1.5}, "seed=1.5: must be an int"),
        ({"seed": None}, "seed=None"),
        ({"levels": "0123"}, "levels='0123': must be numbers"),
        ({"x": [1.0, 2.0]}, "x=[1.0, 2.0]: must be a tensor"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "0-d int64"),
        ({"seed": torch.tensor(1.0)}, "float32"),
        ({"backend": "jax"}, "backend=jax"),
        ({"levels": [0, 1, 3]}, "need 4 levels, got 3"),
        ({"levels": [0, 2, 1, 3]}, "must be increasing"),
        ({"levels": [0, 1, 2, 4]}, "must start at 0 and end at 3"),
        ({"levels": [1, 1.5, 2, 3]}, "must start at 0 and end at 3"),
        ({"levels": [0, float("nan"), 2, 3]}, "must be increasing"),
        ({"x": torch.zeros(4, dtype=torch.float64)}, "x.dtype=torch.float64"),
        ({"x": torch.zeros(4, dtype=torch.int32)}, "x.dtype=torch.int32"),
        ({"x": torch.eye(3).to_sparse()}, "layout"),
    ],
    ids=str,
)
def test_bad_arguments_name_the_value(fields, words):
    arguments = {"x": torch.zeros(4), "bits": 2, "block_size": 2, "seed": 0} | fields
    with pytest.raises(ValueError, match=r".") as error:
        quantize(arguments.pop("x"), **arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_uniform_levels_are_the_fast_path():
    assert check_levels([0, 1, 2, 3], bits=2) is None
    assert check_levels([0, 0.9, 2.1, 3], bits=2) == (0.0, 0.9, 2.1, 3.0)


def test_parts_on_another_device_are_refused():
    kept = quantize(torch.randn(100), bits=2, block_size=10, seed=0)
    with pytest.raises(ValueError, match="zero is on meta: must be on cpu"):
        dequantize(dataclasses.replace(kept, zero=kept.zero.to("meta")))


def test_damaged_payload_is_refused():
    kept = quantize(torch.randn(100), bits=2, block_size=10, seed=0)
    for field, value in (
        ("codes", kept.codes.int()),
        ("zero", kept.zero.double()),
        ("dtype", torch.float64),
        ("bits", 3),
    ):
        with pytest.raises(ValueError, match=field):
            dequantize(dataclasses.replace(kept, **{field: value}))
    for field in ("codes", "zero", "scale"):
        damaged = dataclasses.replace(kept, **{field: getattr(kept, field)[:-1]})
        with pytest.raises(ValueError, match=field):
            dequantize(damaged)
