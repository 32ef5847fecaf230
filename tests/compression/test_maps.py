from __future__ import annotations

import pytest
import torch

from conftest import assert_close
from iexact_runner.compression.bins import ClippedNormal, optimal_levels
from iexact_runner.compression.maps import MapFormat, best_levels, block_size_for, exact_map, kept_columns, levels_for
from iexact_runner.kernels import reference


@pytest.mark.parametrize(
    ("columns", "col_size", "cap", "expected"),
    [
        (16, 0, 1024, 16),
        (16, 1, 1024, 16),
        (16, 64, 1024, 1024),
        (16, 128, 1024, 1024),
        (128, 64, 1024, 1024),
        (128, 4, 1024, 512),
        (63, 64, 1024, 1008),  # Flickr
        (63, 64, None, 4032),
        (5000, 64, 1024, 5000),
        (2000, 0, 1024, 2000),
        (500, 64, 1024, 1000),
    ],
)
def test_block_sizes_of_the_reference(columns, col_size, cap, expected):
    assert block_size_for(columns, col_size=col_size, max_block_size=cap) == expected


@pytest.mark.parametrize(
    ("columns", "kept_frac", "expected"),
    [(128, 0.125, 16), (500, 0.125, 63), (100, 0.07, 7), (10, 1.0, 10), (3, 0.01, 1)],
)
def test_kept_columns(columns, kept_frac, expected):
    assert kept_columns(columns, kept_frac) == expected


def test_levels_of_alpha():
    assert levels_for(2, 0.9) == (0.0, 0.9, 2.1, 3.0)
    assert (
        levels_for(2, "auto") is None
        and levels_for(2, 1.0) is None
        and levels_for(4, 1.0) is None
        and levels_for(None, 1.0) is None
    )


def make_format(bits, kept_frac):
    return MapFormat(bits, kept_frac, col_size=4, levels=None, max_block_size=None, backend="torch")


@pytest.mark.parametrize("kept_frac", [1.0, 0.3])
def test_inner_products_with_a_map_are_those_of_what_is_stored(kept_frac):
    x, grad = torch.randn(37, 20), torch.randn(37, 20)
    layout, tensors = make_format(8, kept_frac).keep(x, seed=3, project=True)
    left, right = layout.inner_product_factors(grad, tensors)
    assert left.shape == right.shape == (37, 20 if kept_frac == 1 else 6)
    assert_close((left * right).sum(1), (grad * layout.decode(tensors)).sum(1))


@pytest.mark.parametrize("seed", [3, torch.tensor(3)], ids=["int", "tensor"])
@pytest.mark.parametrize("bits", [None, 2, 8, 16])
@pytest.mark.parametrize("kept_frac", [1.0, 0.3])
def test_weight_gradient_is_that_of_the_decoded_map(bits, kept_frac, seed):
    x, grad = torch.randn(37, 20), torch.randn(37, 5)
    layout, tensors = make_format(bits, kept_frac).keep(x, seed=seed, project=True)
    decoded = layout.decode(tensors)
    assert decoded.shape == x.shape
    assert_close(layout.weight_gradient(grad, tensors), grad.T @ decoded)
    if kept_frac < 1:
        projection = reference.rademacher(20, 6, seed=3, dtype=x.dtype, device=x.device)
        if bits is None:
            assert_close(decoded, x @ projection @ projection.T)
    elif bits is None:
        assert torch.equal(decoded, x)


@pytest.mark.parametrize(("bits", "kept_frac"), [(None, 1.0), (None, 0.3), (8, 1.0), (8, 0.3), (16, 1.0), (16, 0.3)])
def test_what_decodes_afresh_may_be_written_over_and_nothing_else(bits, kept_frac):
    layout, tensors = make_format(bits, kept_frac).keep(torch.randn(37, 20), seed=0, project=True)
    before = layout.decode(tensors).clone()
    assert layout.decodes_afresh is (bits is not None or kept_frac < 1)
    layout.decode(tensors).zero_()
    assert torch.equal(layout.decode(tensors), before) is layout.decodes_afresh


def test_16_bits_are_bfloat16():
    x = torch.randn(37, 20)
    layout, tensors = make_format(16, 1.0).keep(x, seed=0, project=True)
    assert [tensor.dtype for tensor in tensors] == [torch.bfloat16] and layout.stored_type == "bfloat16"
    assert torch.equal(layout.decode(tensors), x.bfloat16().float())
    product, kept = make_format(16, 1.0).encode_product(x, torch.eye(20), torch.ones(20), seed=0)
    assert torch.equal(product.decode(kept), (x + 1).bfloat16().float())
    layout, tensors = make_format(16, 1.0).keep(x.bfloat16(), seed=0, project=True)
    assert layout.decode(tensors) is tensors[0] and not layout.decodes_afresh


def test_an_exact_map_is_the_map_itself():
    x = torch.randn(4, 3)
    layout, tensors = exact_map(x)
    assert layout.decode(tensors) is x and layout.stored_type == "float32"
    assert layout.independent() is layout and not layout.decodes_afresh


def test_projection_is_only_where_allowed():
    x = torch.randn(10, 20)
    layout, tensors = make_format(8, 0.3).keep(x, seed=0, project=False)
    assert not layout.projected and layout.stored_type == "int8"
    assert_close(layout.decode(tensors), x, tolerance=0.02)


@pytest.mark.parametrize(
    ("shape", "project", "block_size"),
    [((400, 20), False, 80), ((400, 20), True, 24), ((3, 20), False, 60)],
    ids=["as it is", "projected", "smaller than a block"],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_optimal_levels_are_those_of_the_block_in_use(bits, shape, project, block_size):
    form = MapFormat(bits, 0.3, col_size=4, levels=None, max_block_size=None, backend="torch", optimal=True)
    x = torch.randn(shape)
    layout, tensors = form.keep(x, seed=0, project=project)
    assert layout.levels == optimal_levels(bits, distribution=ClippedNormal(block_size))
    if not project:
        assert_close(layout.decode(tensors), x, tolerance=4 / 2**bits)


def test_layer_inputs_without_projection_keep_uniform_levels():
    """Half of a map after ReLU lies at the lower end: the clipped normal's levels would raise the variance."""
    x, errors = torch.randn(256, 32).relu(), []
    best = optimal_levels(4, distribution=ClippedNormal(128))
    for levels, optimal in ((None, True), (best, False)):
        form = MapFormat(4, 1.0, col_size=4, levels=levels, max_block_size=None, backend="torch", optimal=optimal)
        layout, tensors = form.keep(x, seed=0, project=True)
        assert layout.levels == levels
        errors.append((layout.decode(tensors) - x).square().mean())
    assert errors[1] > 1.2 * errors[0]


def test_levels_do_not_matter_where_a_block_has_only_ends():
    assert best_levels(1, 1000) is best_levels(4, 2) is best_levels(8, 1) is best_levels(None, 1000) is None


def test_optimal_levels_reduce_the_error_of_normal_maps():
    """By the expected .1345 against .1675 at d = 1024, and a little more: the extremes of samples lie further out."""
    x, errors = torch.randn(64 * 1024, 16), []
    for optimal in (False, True):
        form = MapFormat(2, 1.0, col_size=64, levels=None, max_block_size=None, backend="auto", optimal=optimal)
        layout, tensors = form.keep(x, seed=1, project=False)
        errors.append((layout.decode(tensors) - x).square().mean().item())
    assert 0.77 < errors[1] / errors[0] < 0.1345 / 0.1675
