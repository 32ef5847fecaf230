"""Captured maps are those that would be quantized, and the figures of a map agree with what is known of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from conftest import projected, tiny_dataset
from iexact_runner.analysis.distribution import captured_maps, divergence, map_figures, normalised
from iexact_runner.cli import compose_config
from iexact_runner.compression.bins import ClippedNormal, Uniform, cell_masses, expected_variance, normal_sigma
from iexact_runner.compression.maps import MapFormat
from iexact_runner.config import SAGEConfig
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare

CPU = torch.device("cpu")


def sage(**fields):
    config = SAGEConfig(name="sage", num_layers=3, hidden_channels=32)
    problem = prepare(tiny_dataset(), config, inductive=False, device=CPU)
    model = build_model(config, in_channels=13, out_channels=3, compression=projected(**fields))
    return model, problem


def test_every_map_of_sage_is_captured_once_in_the_order_of_its_layers():
    model, problem = sage(bits=2, kept_frac=0.25, col_size=4, levels="optimal")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    maps = captured_maps(model, problem, seed=3)
    assert [
        (found.layer, found.op, found.projected, tuple(found.values.shape), found.block_size) for found in maps
    ] == [
        ("blocks.0.conv.lin_l", "Linear", True, (101, 4), 16),
        ("blocks.0.conv.lin_r", "Linear", True, (101, 4), 16),
        ("blocks.0.norm", "BatchNorm", False, (101, 32), 128),
        ("blocks.1.conv.lin_l", "Linear", True, (101, 8), 32),
        ("blocks.1.conv.lin_r", "Linear", True, (101, 8), 32),
        ("blocks.1.norm", "BatchNorm", False, (101, 32), 128),
        ("head.lin_l", "Linear", True, (101, 8), 32),
        ("head.lin_r", "Linear", True, (101, 8), 32),
    ]
    assert model.compression.bits == 2 and model.compression.levels == "optimal"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_shared_and_unprojected_maps_are_the_features_themselves():
    model, problem = sage(bits=2, share_maps=True)
    maps = captured_maps(model, problem, seed=3)
    assert [found.layer for found in maps if found.op == "Linear"] == [
        "blocks.0.conv.lin_l",
        *("blocks.1.conv.lin_l", "head.lin_l"),
    ]
    assert torch.equal(maps[0].values, problem.training.x) and not maps[0].projected


@pytest.mark.parametrize("model", ["gcn", "gcn2", "gat"])
def test_maps_of_every_model_are_captured(model):
    config = compose_config(f"model={model}", "model.num_layers=3", "model.hidden_channels=16")
    problem = prepare(tiny_dataset(), config.model, inductive=False, device=CPU)
    net = build_model(config.model, in_channels=13, out_channels=3, compression=config.compression)
    maps = captured_maps(net, problem, seed=0)
    assert len(maps) >= 4 and {"Linear", "BatchNorm"} <= {found.op for found in maps}
    assert all(found.values.shape[0] == 101 and found.values.isfinite().all() for found in maps)


def test_captured_values_are_what_the_format_quantizes(monkeypatch):
    model, problem = sage(bits=8, kept_frac=0.25, col_size=4)
    kept = []
    keep = MapFormat.keep

    def record(self, x, **options):
        kept.append(keep(self, x, **options))
        return kept[-1]

    maps = captured_maps(model, problem, seed=5)
    monkeypatch.setattr(MapFormat, "keep", record)
    model.train()(problem.training.x, problem.training.graph, seed=5)
    assert len(kept) == len(maps)
    decoded = [layout.stored(tensors) for layout, tensors in kept]
    for found in maps:
        steps = (found.values.max() - found.values.min()) / 255
        assert any(
            found.values.shape == other.shape and (found.values - other).abs().max() < 1.1 * steps for other in decoded
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_figures_of_samples_of_the_model_agree_with_it(bits):
    """Blocks of the clipped normal with both ends: predicted and measured variance within 2%, divergence near 0."""
    d, top = 256, 2**bits - 1
    rng = np.random.default_rng(0)
    blocks = np.clip(rng.normal(top / 2, normal_sigma(d, bits=bits), (4000, d)), 0, top)
    blocks[:, 0], blocks[:, 1] = 0, top  # then the stored scale is 1, exactly
    figures = map_figures(torch.from_numpy(blocks).float(), block_size=d, bits=bits)
    assert figures.d == d and figures.js_clipped_normal < 0.003 < 0.05 < figures.js_uniform
    for levels in (figures.uniform, figures.optimal, figures.empirical):
        assert levels.measured == pytest.approx(levels.predicted, rel=0.02)
    assert figures.uniform.predicted == expected_variance(range(2**bits), distribution=ClippedNormal(d))
    assert figures.uniform.reduction == figures.uniform.error_reduction == 0
    predicted = 1 - figures.optimal.predicted / figures.uniform.predicted
    assert figures.optimal.reduction == pytest.approx(predicted, abs=0.02)
    assert figures.optimal.error_reduction == pytest.approx(figures.optimal.reduction, abs=1e-3)


def test_histogram_finds_better_levels_where_the_model_does_not_fit():
    x = torch.randn(4000, 64).relu() ** 2  # half the values at the lower end, a long tail
    figures = map_figures(x, block_size=1024, bits=2)
    assert figures.js_clipped_normal > 0.3
    assert figures.optimal.reduction < 0 < figures.empirical.reduction


def test_normalised_values_decode_exactly():
    x = torch.randn(50, 64)
    h = normalised(x, bits=4)
    assert h.min() >= 0 and h.max() <= 15 and h.dtype == torch.float64
    low, high = x.aminmax(dim=1)
    # bfloat16 zero and scale cover the block with little to spare.
    assert (h.amin(dim=1) < 0.15).all() and (h.amax(dim=1) > 14.5).all()
    assert torch.allclose(
        (h - h[:, :1]) / (h[:, 1:2] - h[:, :1]), ((x - x[:, :1]) / (x[:, 1:2] - x[:, :1])).double(), rtol=1e-3
    )


def test_constant_blocks_do_not_count():
    x = torch.cat([torch.randn(64, 32), torch.zeros(64, 32)])
    assert dataclasses.asdict(map_figures(x, block_size=32, bits=2)) == dataclasses.asdict(
        map_figures(x[:64], block_size=32, bits=2)
    )
    with pytest.raises(ValueError, match="block_size=32: the map has no whole block"):
        map_figures(torch.zeros(10, 32), block_size=32, bits=2)


def test_divergence_is_zero_of_itself_and_one_of_what_never_meets():
    masses = cell_masses(ClippedNormal(100), cells=16)
    assert divergence(masses, ClippedNormal(100)) == pytest.approx(0, abs=1e-12)
    assert divergence(np.full(16, 1 / 16), Uniform()) == pytest.approx(0, abs=1e-12)
    nearly_two_points = cell_masses(ClippedNormal(2), cells=16)
    assert divergence(np.eye(16)[7], ClippedNormal(2)) == pytest.approx(1)
    assert nearly_two_points[[0, -1]].tolist() == [0.5, 0.5]
