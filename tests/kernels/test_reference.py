from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iexact_runner.compression.seeds import mix, tensor_seed
from iexact_runner.kernels import reference

CPU = torch.device("cpu")
BITS = (1, 2, 4, 8)


def words(*values: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([value]) for value in values)


# Known answers of Random123, the reference implementation of Philox-4x32-10.
@pytest.mark.parametrize(
    ("counter", "seed", "expected"),
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_words(counter, seed, expected):
    for key in (seed, torch.tensor(seed)):
        drawn = reference.philox(words(*counter), key)
        assert tuple(word.item() for word in drawn) == expected


@pytest.mark.parametrize("offset", [0, 1, 7, 8, 13, 2**19 + 5, 2**33 + 5, 2**35 + 5, 2**40 + 3])
def test_draws_follow_the_written_mapping(offset):
    draws = reference.draw16(50, seed=7, purpose=2, device=CPU, offset=offset)
    for position in range(50):
        index = offset + position
        drawn = reference.philox(words(index // 8 & 0xFFFFFFFF, index // 8 >> 32, 2, 0), 7)
        word = drawn[index % 8 // 2].item()
        assert draws[position].item() == (word >> 16 if index % 2 else word & 0xFFFF)


def test_draws_do_not_depend_on_how_they_are_cut(monkeypatch):
    whole = reference.draw16(1000, seed=1, purpose=0, device=CPU)
    monkeypatch.setattr(reference.common, "GROUPS_AT_ONCE", 3)
    assert torch.equal(reference.draw16(1000, seed=1, purpose=0, device=CPU), whole)


def test_draws_are_uniform_and_streams_differ():
    draws = reference.draw16(1 << 20, seed=3, purpose=0, device=CPU)
    counts = torch.bincount(draws >> 8, minlength=256).double()
    chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    for other in (dict(seed=3, purpose=1), dict(seed=4, purpose=0)):
        equal = (reference.draw16(1 << 16, **other, device=CPU) == draws[: 1 << 16]).sum().item()
        assert equal < 10  # one expected


@given(st.lists(st.integers(0, 255), max_size=70), st.sampled_from(BITS))
def test_unpack_inverts_pack(values, bits):
    codes = torch.tensor(values, dtype=torch.uint8) & (2**bits - 1)
    packed = reference.pack(codes, bits)
    assert packed.numel() == -(-len(values) * bits // 8)
    assert torch.equal(reference.unpack(packed, len(values), bits), codes)
    # All bytes as one number, low byte first: code i begins at bit i * bits, and nothing is past the last.
    assert int.from_bytes(packed.tolist(), "little") == sum(
        code << (bits * index) for index, code in enumerate(codes.tolist())
    )


def test_pack_puts_the_first_element_lowest():
    assert reference.pack(torch.tensor([1, 2, 3, 0, 2], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b10]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=300)
@given(st.floats(width=32, allow_nan=False))
def test_directed_rounding_brackets_and_is_tight(dtype, value):
    exact = torch.tensor([value])
    down, up = reference.round_down(exact, dtype), reference.round_up(exact, dtype)
    assert down.item() <= exact.item() <= up.item()
    if torch.isfinite(down).item() and torch.isfinite(up).item():
        infinity = torch.tensor([math.inf], dtype=dtype)
        next_up = torch.nextafter(down, infinity)
        assert exact.item() == down.item() == up.item() or up.item() == next_up.item()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [1, 3, 63, 64, 1000, 5000])
def test_codes_without_randomness_are_the_formula(bits, block_size, monkeypatch):
    """With u = 1/2 the codes are h rounded to nearest, element by element in Python floats."""
    monkeypatch.setattr(
        reference.quantizer, "draw16", lambda count, **_: torch.full((count,), 1 << 15, dtype=torch.int32)
    )
    x = torch.randn(1031, generator=torch.Generator().manual_seed(bits))
    packed, zero, scale = reference.quantize(x, bits=bits, block_size=block_size, levels=None, seed=0)
    codes = reference.unpack(packed, 1031, bits).tolist()
    u, top = (2.0**15 + 0.5) / 2.0**16, 2**bits - 1
    assert zero.numel() == scale.numel() == -(-1031 // block_size)
    for index, value in enumerate(x.tolist()):
        block = index // block_size
        members = x[block * block_size : (block + 1) * block_size]
        z, s = zero[block].item(), scale[block].item()
        assert z <= members.min().item() and z + top * s >= members.max().item() - 1e-6 * top * s
        inverse = (torch.tensor(1.0) / torch.tensor(s)).item()
        h = ((torch.tensor(value) - torch.tensor(z)) * torch.tensor(inverse)).item()
        assert codes[index] == min(math.floor(h) + (u < h - math.floor(h)), top)


@pytest.mark.parametrize("levels", [None, (0.0, 0.7, 2.3, 3.0)], ids=["uniform", "levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decoded_values_are_unbiased(levels, dtype):
    """20 random functionals of the mean over 400 seeds, within 4 standard errors."""
    x = torch.randn(600, generator=torch.Generator().manual_seed(0)).to(dtype)
    functionals = torch.randn(20, 600, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for seed in range(400):
        kept = reference.quantize(x, bits=2, block_size=96, levels=levels, seed=mix(seed))
        decoded = reference.dequantize(*kept, bits=2, block_size=96, levels=levels, shape=(600,), dtype=torch.float32)
        errors.append(functionals @ (decoded.double() - x.double()))
    errors = torch.stack(errors)
    standard_error = errors.std(0) / math.sqrt(len(errors))
    assert (errors.mean(0).abs() < 4 * standard_error).all()


@pytest.mark.parametrize("bits", BITS)
def test_error_stays_within_a_bin_and_variance_is_that_of_rounding(bits):
    x = torch.rand(1 << 16, generator=torch.Generator().manual_seed(2))
    kept = reference.quantize(x, bits=bits, block_size=1 << 16, levels=None, seed=5)
    decoded = reference.dequantize(*kept, bits=bits, block_size=1 << 16, levels=None, shape=x.shape, dtype=x.dtype)
    step = kept[2].float().item()
    errors = decoded - x
    assert errors.abs().max() <= step * (1 + 1e-5)
    # Uniform inputs: the variance (h - l)(u - h) averages to 1/6 of a squared bin.
    assert errors.square().mean().item() == pytest.approx(step**2 / 6, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.0, -0.0, 3.0, -1.7, 1e-38, 65000.0])
def test_constant_block_decodes_to_its_constant(value, dtype):
    x = torch.full((4000,), value).to(dtype)
    kept = reference.quantize(x, bits=2, block_size=50, levels=None, seed=1)
    decoded = reference.dequantize(*kept, bits=2, block_size=50, levels=None, shape=x.shape, dtype=torch.float32)
    spread = decoded.std().item() / math.sqrt(4000)
    assert abs(decoded.mean().item() - x[0].float().item()) <= 4 * spread + 1e-30


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_infinity_poison_their_block_only(bad, bits):
    x = torch.randn(100)
    x[37] = bad
    kept = reference.quantize(x, bits=bits, block_size=10, levels=None, seed=0)
    decoded = reference.dequantize(*kept, bits=bits, block_size=10, levels=None, shape=x.shape, dtype=x.dtype)
    poisoned = torch.zeros(100, dtype=torch.bool)
    poisoned[30:40] = True
    assert torch.equal(decoded.isnan(), poisoned)


def test_codes_do_not_depend_on_what_follows_them():
    """The random numbers belong to the element, not to the launch: a piece with its offset gets the same codes."""
    x = torch.randn(640)
    whole = reference.quantize(x, bits=4, block_size=64, levels=None, seed=9)
    piece = reference.quantize(x[128:], bits=4, block_size=64, levels=None, seed=9, offset=128)
    assert torch.equal(whole[0][64:], piece[0]) and torch.equal(whole[1][2:], piece[1])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.75])
def test_dropout_keeps_its_share_and_the_mean(p):
    x = torch.ones(1 << 18)
    dropped = reference.dropout(x, p=p, seed=11)
    deviation = math.sqrt(p * (1 - p) / x.numel())
    assert abs((dropped == 0).double().mean().item() - p) < 4 * deviation + 2**-17
    assert abs(dropped.double().mean().item() - 1) < 4 * deviation / (1 - p)
    assert torch.equal(reference.dropout(x, p=p, seed=11), dropped)
    assert not torch.equal(reference.dropout(x, p=p, seed=12), dropped)


def test_dropout_of_all_but_everything_keeps_one_draw_and_stays_finite():
    assert reference.dropout_threshold(1 - 1e-9) == reference.DRAWS - 1 and reference.dropout_factor(1 - 1e-9) == 2**16
    kept = reference.keep_mask(1 << 20, p=1 - 1e-9, seed=0, device=CPU).sum().item()
    assert 0 < kept < 60  # 16 expected


def test_kept_mask_and_regenerated_dropout_agree():
    x = torch.randn(37, 63)
    mask = reference.dropout_mask(x.numel(), p=0.3, seed=2, device=CPU)
    assert mask.numel() == -(-x.numel() // 8)
    assert torch.equal(reference.apply_dropout_mask(x, mask, p=0.3), reference.dropout(x, p=0.3, seed=2))


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_leaky_relu_and_its_gradient_are_exact(slope):
    x = torch.randn(37, 63)
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    x.requires_grad_()
    grad = torch.randn(37, 63)
    expected = torch.nn.functional.leaky_relu(x, slope)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    y, mask = reference.leaky_relu(x.detach(), negative_slope=slope)
    assert torch.equal(y, expected.detach())
    assert torch.equal(reference.leaky_relu_backward(grad, mask, negative_slope=slope), expected_grad)


def test_relu_lets_nan_and_its_gradient_through():
    y, mask = reference.leaky_relu(torch.tensor([math.nan, -1.0]), negative_slope=0.0)
    assert y[0].isnan() and y[1] == 0
    assert reference.leaky_relu_backward(torch.ones(2), mask, negative_slope=0.0).tolist() == [1.0, 0.0]


def test_fused_relu_dropout_is_the_two_in_turn():
    x, grad = torch.randn(37, 63), torch.randn(37, 63)
    y, mask = reference.leaky_relu_dropout(x, negative_slope=0.1, p=0.4, seed=3, offset=5)
    activated, expected_mask = reference.leaky_relu(x, negative_slope=0.1)
    assert torch.equal(y, reference.dropout(activated, p=0.4, seed=3, offset=5))
    assert torch.equal(mask, expected_mask)
    kept = reference.dropout(torch.ones_like(x), p=0.4, seed=3, offset=5)
    slope = torch.where(x > 0, 1.0, 0.1)
    backward = reference.leaky_relu_dropout_backward(grad, mask, negative_slope=0.1, p=0.4, seed=3, offset=5)
    torch.testing.assert_close(backward, grad * kept * slope)


def test_rademacher_projection_is_an_isometry_in_expectation():
    draws = torch.stack(
        [reference.rademacher(12, 4, seed=mix(s), dtype=torch.float32, device=CPU) for s in range(4000)]
    )
    assert draws.abs().unique().tolist() == [0.5]
    gram = torch.einsum("sir,sjr->ij", draws, draws) / len(draws)
    # Off-diagonal entries are means of 4 products of independent signs / 4: standard deviation 1/2 a draw.
    assert (gram - torch.eye(12)).abs().max().item() < 5 * 0.5 / math.sqrt(len(draws))


def test_global_generator_is_not_touched():
    state = torch.random.get_rng_state()
    reference.quantize(torch.ones(10), bits=2, block_size=5, levels=None, seed=0)
    reference.dropout(torch.ones(10), p=0.5, seed=0)
    reference.rademacher(3, 2, seed=0, dtype=torch.float32, device=CPU)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_seeds_are_distinct_and_alike_for_ints_and_tensors():
    seeds = {mix(run, step) for run in range(20) for step in range(50)}
    seeds |= {tensor_seed(seed, index) for seed in list(seeds) for index in range(20)}
    assert len(seeds) == 1000 * 21
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    step = mix(3, 4)
    assert tensor_seed(torch.tensor(step), 7).item() == tensor_seed(step, 7)


def test_columns_are_the_diagonal_of_directions():
    nodes, width, seed = 70, 24, 5
    factor, shift, limit = torch.randn(width), torch.randn(width), torch.rand(width)
    coefficients, grad = torch.randn(nodes, width), torch.randn(nodes, width)
    mask = reference.leaky_relu(torch.randn(nodes, width), negative_slope=0.0)[1]
    random = {"p": 0.4, "seed": seed}
    found = []
    for directions in (factor, factor.diag()):
        sketch = (coefficients, directions, shift)
        signs = reference.pack_signs(mask, *sketch, limit, exact=True, **random)
        joined = reference.join_streams(*signs, capacity=int(reference.stream_lengths(signs[1]).sum()))
        found.append(
            (
                reference.decode_relu_dropout(*sketch, mask, **random),
                reference.decode_relu_dropout(*sketch, None, **random),
                reference.gated_sums(grad, mask, *sketch[:2], **random),
                reference.gated_gradient(grad, mask, *sketch[:2], shift, limit, **random),
                joined,
                signs[1],
                *reference.unpack_signs(joined, signs[1], *sketch, limit, exact=True, **random),
            )
        )
    assert all(torch.equal(column, matrix) for column, matrix in zip(*found, strict=True))


@pytest.mark.parametrize("exact", [False, True])
def test_chunks_that_hold_another_number_of_signs_are_counted(exact):
    """What is decoded in the backward pass must be what the forward pass decoded, or signs would shift."""
    c, v, shift = torch.randn(200, 3), torch.randn(40, 3), torch.randn(40)
    mask, sketch = reference.pack((c @ v.T > 0).flatten().byte(), 1), (c, v, shift, torch.ones(40))
    form = {"exact": exact, "p": 0.3, "seed": 1}
    streams, counts = reference.pack_signs(mask, *sketch, **form)
    capacity = int(reference.stream_lengths(counts).sum()) + 8
    assert counts.size(1) > 5
    for chunks in ([], [1], [0, 2, 5]):
        changed = counts.clone()
        changed[0, chunks] += 1
        stream = reference.join_streams(streams, changed, capacity=capacity)
        assert int(reference.unpack_signs(stream, changed, *sketch, **form)[1]) == len(chunks)
