"""Low-rank blocks with dealt bits and signs from the sketch: what is true, what is near, kept, and noticed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_close, relative_error, tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.compression import signs
from iexact_runner.compression.sketch import SketchLayout
from iexact_runner.nn.convert import compress
from schemes.test_lowrank import CONFIGS, ROUNDING, TWIN, gradient, joined, kept, low_rank, make

DEALT = dict(bits=None, rank=None, map_bits=32)


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_signs_give_the_gradient_of_all_stored_signs(name, dataset):
    config = CONFIGS[name]
    _, stored = gradient(make(config, low_rank(**DEALT)), config, dataset)
    for threshold in (0.3, 1.0):
        scheme = low_rank(**DEALT, sign_threshold=threshold, signs="exact")
        _, listed = gradient(make(config, scheme), config, dataset)
        assert relative_error(joined(listed), joined(stored)) < 1e-6


@pytest.mark.parametrize("preset", ["lowrank", "lowrank_small", "lowrank_fine"])
@pytest.mark.parametrize("name", CONFIGS)
def test_presets_are_exact_forward_and_near_backward(name, preset, dataset):
    config, scheme = CONFIGS[name], compose_config(f"compression={preset}").compression
    expected, exact = gradient(make(config, TWIN), config, dataset)
    scores, found = gradient(make(config, scheme), config, dataset)
    assert_close(scores, expected, tolerance=ROUNDING)
    most = {"lowrank": 0.5, "lowrank_small": 0.8, "lowrank_fine": 0.25}[preset]
    assert relative_error(joined(found), joined(exact)) < most


def test_more_bits_and_higher_thresholds_are_closer():
    dataset, config = tiny_dataset(nodes=1024), CONFIGS["sage"]
    exact = joined(gradient(make(config, TWIN), config, dataset)[1])

    def error(**fields):
        return relative_error(joined(gradient(make(config, low_rank(**(DEALT | fields))), config, dataset)[1]), exact)

    by_bits = [error(map_bits=bits) for bits in (8, 16, 32, 64)]
    assert by_bits == sorted(by_bits, reverse=True)
    by_threshold = [error(map_bits=64, sign_threshold=threshold) for threshold in (0.1, 0.5, 1.0, 3.0)]
    assert by_threshold == sorted(by_threshold, reverse=True)


def test_a_share_of_the_signs_is_stored():
    dataset, config = tiny_dataset(nodes=8192), CONFIGS["sage"]

    def sign_bytes(**fields):
        records = kept(make(config, low_rank(**DEALT, **fields)), config, dataset)
        return sum(record.bytes for record in records if record.dtype == "mask")

    every = sign_bytes()
    assert every == 2 * 8192 * 16 / 8
    for share in (0.1, 0.3):
        stored = sign_bytes(sign_threshold=9.0, sign_share=share) / every
        assert stored == pytest.approx(share * (1 - config.dropout), rel=0.15)
    assert sign_bytes(sign_threshold=9.0) / every == pytest.approx(1 - config.dropout, rel=0.05)


def test_a_sketch_that_is_sure_of_others_than_before_is_noticed(dataset, monkeypatch):
    config = CONFIGS["sage"]
    mask = SketchLayout.mask

    def nudged(layout, tensors, seed):
        tensors = list(tensors)
        tensors[layout.parts - 2] = tensors[layout.parts - 2] + 0.3
        return mask(layout, tuple(tensors), seed)

    monkeypatch.setattr(SketchLayout, "mask", nudged)
    with pytest.raises(RuntimeError, match="signs of a low-rank sketch were not decoded"):
        gradient(make(config, low_rank(**DEALT, sign_threshold=1.0)), config, dataset)


def test_a_seed_that_is_a_tensor_gives_the_same_gradient(dataset):
    for name in ("sage", "gcn2", "gat-arxiv"):
        config, scheme = CONFIGS[name], low_rank(**DEALT, sign_threshold=1.0, rounding="stochastic")
        _, expected = gradient(make(config, scheme), config, dataset, seed=5)
        _, found = gradient(make(config, scheme), config, dataset, seed=torch.tensor(5))
        assert torch.equal(joined(expected), joined(found)), name


def test_directions_that_follow_keep_the_order_that_bits_are_dealt_in():
    dataset, config = tiny_dataset(nodes=1024), CONFIGS["sage"]
    exact = joined(gradient(make(config, TWIN), config, dataset, seed=9)[1])
    errors = {}
    for refresh in (1, 9):
        model = make(config, low_rank(**DEALT, refresh=refresh))
        for number in range(8):
            gradient(model, config, dataset, seed=number)
        fresh = make(config, low_rank(**DEALT, refresh=refresh))
        fresh.directions = model.directions
        errors[refresh] = relative_error(joined(gradient(fresh, config, dataset, seed=9)[1]), exact)
    assert errors[9] < 1.15 * errors[1]


def test_bits_stay_until_directions_are_found_anew(dataset):
    config = CONFIGS["sage"]
    model = make(config, low_rank(**DEALT, refresh=3))
    dealt = []
    for number in range(4):
        gradient(model, config, dataset, seed=number)
        dealt.append(model.directions[0].bits)
    assert dealt[0] is dealt[1] is dealt[2] and dealt[3] is not dealt[0]
    assert all(bits.sum() == 32 and bits.numel() == 12 for bits in dealt)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, dataset):
    config = CONFIGS["sage"]
    errors = {}
    for name, scheme in {"all": low_rank(**DEALT), "some": low_rank(**DEALT, sign_threshold=2.0)}.items():
        exact = joined(gradient(make(config, TWIN), config, dataset)[1])
        with torch.autocast("cpu", dtype):
            found = joined(gradient(make(config, scheme), config, dataset)[1])
        errors[name] = relative_error(found, exact)
    assert errors["some"] < 1.2 * errors["all"] + 0.05 and errors["all"] < 0.7


def test_models_of_others():
    x, y = torch.randn(400, 12) @ torch.randn(12, 12), torch.randint(3, (400,))

    def gradients(scheme):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(inplace=True), nn.Linear(32, 3)
        ).train()
        if scheme is not None:
            compress(model, scheme)
        F.cross_entropy(model(x), y).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    exact, every = gradients(None), gradients(low_rank(**DEALT))
    listed = gradients(low_rank(**DEALT, sign_threshold=1.0, signs="exact"))
    assert relative_error(listed, every) < 1e-6 and relative_error(every, exact) < 0.5


def test_room_on_a_gpu_is_that_of_the_pass_before_and_some_more():
    """What a CPU can show of it: lengths decide there, and a share of tensors without data."""
    room = signs.Room(share=0.25)
    assert room.capacity(torch.tensor([3, 4]), 100, p=0.0) == 7
    with torch._subclasses.FakeTensorMode() as fake:
        assert room.capacity(fake.from_tensor(torch.tensor([3, 4])), 100, p=0.5) == 12


def test_room_of_a_mini_batch_is_in_proportion_to_its_size():
    room = signs.Room(bytes=80_000, most=400_000)
    assert room._some_more(400_000) == 80_000 * 9 // 8 + 4096
    assert room._some_more(800_000) == 160_000 * 9 // 8 + 4096
    assert room._some_more(4_000) == 4_000
    assert signs.Room(**room.state()) == room
