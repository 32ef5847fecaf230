from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iexact_runner.compression import dequantize, quantize
from iexact_runner.compression.codec import BITS, DTYPES, check_levels

SEEDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def formats(draw):
    """Bits, block size and levels, which are multiples of 1/64 and so exact in every product below."""
    width = draw(st.sampled_from(BITS))
    top = 2**width - 1
    inner = draw(st.sets(st.integers(1, 64 * top - 1), min_size=top - 1, max_size=top - 1)) if top < 16 else range(0)
    levels = (0.0, *(step / 64 for step in sorted(inner)), float(top)) if len(inner) == top - 1 else None
    uniform = draw(st.booleans())
    return {"bits": width, "block_size": draw(st.integers(1, 200)), "levels": None if uniform else levels}


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 9), max_size=4), st.sampled_from(DTYPES), formats(), SEEDS, st.integers(-4, 4), st.data()
)
def test_every_decoded_value_lies_within_a_bin_of_its_own(shape, dtype, form, seed, magnitude, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    spread = data.draw(st.sampled_from([0.0, 1e-3, 1.0]))  # constant, nearly constant and normal
    x = ((data.draw(st.integers(-3, 3)) + spread * torch.randn(shape, generator=generator)) * 10.0**magnitude).to(dtype)
    kept = quantize(x, **form, seed=seed, backend="torch")
    decoded = dequantize(kept, backend="torch")
    assert decoded.shape == x.shape and decoded.dtype == dtype
    levels = form["levels"] or (0.0, 1.0)
    widest = max(high - low for low, high in zip(levels, levels[1:], strict=False))
    scale = kept.scale.double().repeat_interleave(form["block_size"])[: x.numel()]
    zero = kept.zero.double().repeat_interleave(form["block_size"])[: x.numel()]
    flat = x.double().flatten()
    # One rounding to the type of the map, and a few of float32 on the way.
    rounding = torch.finfo(dtype).eps * (flat.abs() + scale) + 1e-6 * (zero.abs() + 256 * scale)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((decoded.double().flatten() - flat).abs() <= widest * scale + rounding + smallest).all()


@settings(max_examples=150)
@given(formats(), SEEDS, st.integers(-128, 128), st.integers(-6, 6), st.data())
def test_values_on_levels_come_back_exactly_whatever_the_seed(form, seed, zero, exponent, data):
    levels = form["levels"] or tuple(range(2 ** form["bits"]))
    blocks = data.draw(st.integers(1, 4))
    choice = st.integers(0, len(levels) - 1)
    size = max(2, form["block_size"] % 40)
    codes = [[0, len(levels) - 1, *data.draw(st.lists(choice, min_size=size - 2, max_size=size - 2))]] * blocks
    x = zero + 2.0**exponent * torch.tensor([[levels[code] for code in block] for block in codes])
    kept = quantize(x, **(form | {"block_size": size}), seed=seed, backend="torch")
    assert torch.equal(dequantize(kept, backend="torch"), x)
    assert kept.zero.tolist() == [zero] * blocks and kept.scale.tolist() == [2.0**exponent] * blocks


@settings(max_examples=50)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), formats(), SEEDS)
def test_codes_are_those_of_the_flat_map(shape, form, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))
    kept, flat = (quantize(y, **form, seed=seed, backend="torch") for y in (x, x.flatten()))
    assert torch.equal(kept.codes, flat.codes) and torch.equal(kept.zero, flat.zero)
    assert kept.codes.numel() == -(-x.numel() * form["bits"] // 8)
    assert kept.scale.numel() == -(-x.numel() // form["block_size"])


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


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_caller_s_default_type_plays_no_part(backend):
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    before = quantize(x, bits=2, block_size=64, seed=1, backend=backend)
    decoded = dequantize(before, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        kept = quantize(x, bits=2, block_size=64, seed=1, backend=backend)
        assert torch.equal(kept.codes, before.codes) and kept.scale.dtype == before.scale.dtype
        again = dequantize(kept, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32 and torch.equal(again, decoded)
