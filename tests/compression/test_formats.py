"""Published formats of a kept map: their formulas, their bytes, and which of them are unbiased."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from conftest import assert_close, relative_error
from iexact_runner.compression.formats import format_of
from iexact_runner.compression.formats.actnn import CODE_BITS, deal_bits
from iexact_runner.compression.formats.hadamard import hadamard
from iexact_runner.config.presets import preset
from iexact_runner.errors import ConfigError

PRESETS = ("actnn", "dropit", "velora", "hadamard")
SHAPES = [(37, 20), (1, 5), (64, 128), (9, 300)]


def activations(*shape):
    """Like a layer's: rectified, with rows and columns of different sizes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[1], generator=generator)
    return (x * (1 + 5 * torch.rand(shape[0], 1, generator=generator))).relu()


def decoded(name, x, *, seed=3, project=True, **fields):
    layout, tensors = format_of(preset(name, **fields)).keep(x, seed=seed, project=project)
    return layout.decode(tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [3, torch.tensor(3)], ids=["int", "tensor"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_use_of_a_map_is_that_of_the_decoded_map(name, seed, shape):
    x, grad, wide = activations(*shape), torch.randn(shape[0], 7), torch.randn(*shape)
    for project in (True, False):
        layout, tensors = format_of(preset(name)).keep(x, seed=seed, project=project)
        found = layout.decode(tensors)
        assert layout.shape == found.shape == x.shape and found.dtype == x.dtype
        assert torch.equal(found, decoded(name, x, seed=3, project=project))
        assert_close(layout.weight_gradient(grad, tensors), grad.T @ found)
        left, right = layout.inner_product_factors(wide, tensors)
        assert_close((left * right).sum(1), (wide * found).sum(1))
        before = found.clone()
        assert layout.decodes_afresh is not torch.equal(found, x)
        layout.decode(tensors).zero_()
        assert torch.equal(layout.decode(tensors), before) is layout.decodes_afresh


def test_positions_of_dropit_are_as_long_as_the_map_needs():
    for rows, kind in ((2**16, torch.int32), (2**16 + 1, torch.int64)):
        x = torch.empty(rows, 2**15, device="meta")  # 2**31 elements, whose last position is the largest int32
        assert format_of(preset("dropit")).keep(x, seed=3, project=True).tensors[1].dtype == kind


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PRESETS)
def test_bytes_are_known_without_numbers(name, shape, project):
    """A tensor without memory is kept in as many bytes, but for codes of rows that end within a byte."""

    def kept(x):
        return sum(tensor.nbytes for tensor in format_of(preset(name)).keep(x, seed=3, project=project).tensors)

    with FakeTensorMode() as mode:
        counted = kept(mode.from_tensor(activations(*shape)))
    taken = kept(activations(*shape))
    # Dealt bits may not all fit: at most 3 are left over, of each element of a row.
    slack = 3 * shape[1] / 8 + len(CODE_BITS) if name == "actnn" else 0
    assert counted - slack <= taken <= counted + (len(CODE_BITS) if name == "actnn" else 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_page(shape):
    """docs/memory.md, to the byte where it says no more."""
    nodes, columns = shape
    elements = nodes * columns

    def kept(name, *, project=True, **fields):
        x = torch.randn(*shape)
        return sum(
            tensor.nbytes for tensor in format_of(preset(name, **fields)).keep(x, seed=3, project=project).tensors
        )

    assert kept("dropit", kept_frac=0.3) == 8 * int(0.3 * elements)
    width = min(8, columns)
    assert kept("velora", group_size=8) == 4 * nodes * -(-columns // width) + 4 * width
    assert kept("dropit", project=False) == kept("velora", project=False) == 4 * elements
    groups = -(-elements // 32)
    assert kept("hadamard", group_size=32, bits=4) == groups * 32 * 4 // 8 + 4 * groups + 32
    width = min(64, columns)
    groups = nodes * -(-columns // width)
    limit = groups * width * 2 / 8 + 4 * groups + nodes / 4
    assert limit - 3 * columns / 8 - 1 <= kept("actnn", group_size=64) <= limit + len(CODE_BITS)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("name", ["actnn", "hadamard"])
def test_rounding_formats_are_unbiased(name, project):
    x, draws = activations(40, 32), 600
    fields = {} if name == "actnn" else {"group_size": 32}
    samples = torch.stack([decoded(name, x, seed=seed, project=project, **fields) for seed in range(draws)]).double()
    spread = samples.std(0)
    # The stored zero and scale are rounded to bfloat16.
    allowed = 5 * spread / draws**0.5 + 2.0**-7 * x.abs().amax(1, keepdim=True)
    assert ((samples.mean(0) - x).abs() <= allowed).all()
    error = relative_error(samples.mean(0), x)
    assert error < 0.1 * relative_error(samples[0], x)


@pytest.mark.parametrize(("name", "referenced"), [*((name, True) for name in PRESETS), ("int4", False)])
def test_features_are_kept_by_the_published_layouts_alone(name, referenced):
    assert format_of(preset(name)).references_features is referenced


@pytest.mark.parametrize("name", ["dropit", "velora"])
def test_the_others_are_biased_and_leave_other_maps_as_they_are(name):
    x = activations(40, 32)
    draws = [decoded(name, x, seed=seed) for seed in (1, 2)]
    assert torch.equal(*draws) and relative_error(draws[0], x) > 0.2
    assert torch.equal(decoded(name, x, project=False), x)
    assert 0 < relative_error(decoded(name, x, project=False, bits=8), x) < 0.02


def test_dropit_keeps_the_largest_elements():
    x = torch.randn(50, 20)
    kept = decoded("dropit", x, kept_frac=0.25)
    threshold = x.abs().flatten().sort(descending=True).values[250 - 1]
    assert torch.equal(kept, torch.where(x.abs() >= threshold, x, 0.0))
    layout, tensors = format_of(preset("dropit", kept_frac=0.25)).keep(x, seed=0, project=True)
    assert [(tensor.dtype, tensor.numel()) for tensor in tensors] == [(torch.float32, 250), (torch.int32, 250)]


def test_velora_projects_every_sub_token_onto_one_vector():
    x = activations(30, 20)
    mean = x.view(-1, 5).mean(0)
    vector = mean / mean.norm()
    tokens = x.view(-1, 5)
    assert_close(decoded("velora", x, group_size=5), torch.outer(tokens @ vector, vector).view(30, 20))
    padded = torch.nn.functional.pad(x, (0, 1)).view(-1, 7)
    vector = padded.mean(0) / padded.mean(0).norm()
    expected = torch.outer(padded @ vector, vector).view(30, 21)[:, :20]
    assert_close(decoded("velora", x, group_size=7), expected)
    assert not decoded("velora", torch.zeros(3, 20)).any()


@pytest.mark.parametrize("size", [2, 8, 128])
def test_hadamard_matrix_is_symmetric_and_orthogonal(size):
    matrix = hadamard(size, like=torch.zeros(1, dtype=torch.float64))
    assert torch.equal(matrix, matrix.T) and (matrix.abs() - size**-0.5).abs().max() < 1e-15
    assert_close(matrix @ matrix, torch.eye(size, dtype=torch.float64), tolerance=1e-12)


def test_hadamard_transform_spreads_an_outlier():
    """One large element a row makes the blocks of plain INT2 coarse, and no transformed one."""
    x = torch.rand(64, 128)
    x[:, 0] = 100.0
    plain, turned = (relative_error(decoded(name, x)[:, 1:], x[:, 1:]) for name in ("int2", "hadamard"))
    assert turned < 0.5 * plain


@pytest.mark.parametrize("mean_bits", [1, 2, 4, 8])
def test_dealt_bits_are_the_best_that_fit(mean_bits):
    """No choice of as many bits leaves less variance, but for what one row's step comes to."""
    weights = torch.tensor([9.0, 0.1, 400.0, 3.0, 0.0, 25.0])
    bits = torch.tensor(CODE_BITS)
    chosen = bits[deal_bits(weights, mean_bits=mean_bits).long()]
    budget = mean_bits * len(weights)
    assert budget - 3 <= chosen.sum() <= budget

    def variance(each):
        return (weights.double() / (2.0 ** torch.as_tensor(each).double() - 1) ** 2).sum().item()

    best = min(variance(each) for each in itertools.product(CODE_BITS, repeat=6) if sum(each) <= int(chosen.sum()))
    assert variance(chosen) == pytest.approx(best)


def test_rows_of_large_range_get_more_bits():
    x = torch.rand(100, 64)
    x[:10] *= 100
    fixed, dealt = decoded("int2", x), decoded("actnn", x)
    assert (dealt - x).norm() < 0.2 * (fixed - x).norm()
    layout, tensors = format_of(preset("actnn")).keep(x, seed=0, project=True)
    assert sum(tensor.nbytes for tensor in tensors) < 1.1 * (100 * 64 * 2 / 8 + 100 * 4 + 25)


def test_a_row_without_numbers_decodes_to_none():
    x = activations(20, 16)
    x[3, 5] = float("nan")
    found = decoded("actnn", x)
    assert found[3].isnan().all() and found[:3].isfinite().all() and found[4:].isfinite().all()


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("actnn", {"bits": None}, "compression.bits=null: compression.format=actnn needs 1, 2, 4 or 8"),
        ("actnn", {"group_size": 0}, "compression.group_size=0: must be 1 or more"),
        ("hadamard", {"group_size": 96}, "compression.group_size=96: must be a power of two"),
        ("velora", {"kept_frac": 0.5}, "compression.kept_frac=0.5: is of compression.format=blocks or dropit"),
        ("dropit", {"col_size": 4}, "compression.col_size=4: is of compression.format=blocks, which is dropit here"),
        ("iexact", {"group_size": 4}, "compression.group_size=4: is of compression.format=actnn or velora or hadamard"),
        ("lowrank", {"format": "actnn"}, "compression.format=actnn: is for schemes that keep map by map"),
        ("iexact", {"format": "zip"}, "compression.format=zip: must be one of blocks, actnn"),
        ("recompute", {"bits": 2}, "compression.bits=2: compression=recompute keeps FP32"),
        ("none", {"simulate": True}, "compression.simulate=true: compression=none keeps FP32"),
        ("iexact", {"offload_folder": "/tmp"}, "compression.offload_folder=/tmp: must be a folder, with"),
    ],
)
def test_fields_that_do_not_fit_are_told(name, fields, message):
    with pytest.raises(ConfigError) as raised:
        preset(name, **fields)
    assert message in str(raised.value)
