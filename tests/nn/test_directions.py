"""Directions of a compressed model of others: found anew in each pass, or going on where its passes are alike."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import relative_error
from iexact_runner import compress, compressed_pass
from iexact_runner.schemes import lowrank

WIDTH, ROWS = 48, 300


class Layers(nn.Module):
    """Maps that a few directions hold nearly all of."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.body(x))


class Changing(nn.Module):
    """Takes another way every second pass, with other maps."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([Layers(), Layers(32)])
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.ways[self.passes % 2](x)


@pytest.fixture
def found(monkeypatch):
    """How many directions were found anew so far, and how many followed."""
    counts = {"leading_directions": 0, "followed_directions": 0}

    def counted(name):
        plain = getattr(lowrank, name)

        def call(*arguments, **fields):
            counts[name] += 1
            return plain(*arguments, **fields)

        return call

    for name in counts:
        monkeypatch.setattr(lowrank, name, counted(name))
    return counts


def inputs(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(ROWS, 4, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def gradient(model, number, call=None):
    x, y = inputs(number)
    model.zero_grad()
    F.cross_entropy((call or model)(x), y).backward()
    return torch.cat([torch.zeros(0) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def compressed(model, **fields):
    torch.manual_seed(0)
    exact = copy.deepcopy(model)
    compress(model, "lowrank", **fields)
    return model.train(), exact.train()


def test_directions_follow_from_pass_to_pass(found):
    torch.manual_seed(0)
    model, exact = compressed(Layers(), refresh=3)
    errors, anew = [], []
    for number in range(7):
        before = found["leading_directions"]
        errors.append(relative_error(gradient(model, number), gradient(exact, number)))
        anew.append(found["leading_directions"] - before)
    maps = anew[0]
    assert maps > 1 and anew == [maps, 0, 0, maps, 0, 0, maps]
    assert found["followed_directions"] == 4 * maps
    assert max(errors) < 1.5 * errors[0] and errors[0] > 1e-4


def test_each_pass_finds_its_own_unless_told(found):
    model, _ = compressed(Layers())
    for number in range(3):
        gradient(model, number)
    assert found["leading_directions"] % 3 == 0 and found["followed_directions"] == 0


def test_parts_that_are_called_by_themselves_have_directions_of_their_own(found):
    model, exact = compressed(Layers(), refresh=100)
    for number in range(3):
        error = relative_error(gradient(model, number, lambda x: model.head(model.body(x))), gradient(exact, number))
        assert 0 < error < 0.3
    assert len(model.body._kept_directions) > 0 and not model._kept_directions


def test_a_pass_over_several_calls_goes_on_as_well(found):
    model, _ = compressed(Layers(), refresh=2)
    for number in range(2):
        with compressed_pass(model):
            x, y = inputs(number)
            F.cross_entropy(model.head(model.body(x)), y).backward()
    assert found["leading_directions"] == found["followed_directions"] > 0


def test_maps_of_another_width_have_their_directions_found_anew(found):
    torch.manual_seed(0)
    model, exact = compressed(Changing(), refresh=100)
    for number in range(4):
        error = relative_error(gradient(model, number), gradient(exact, number))
        assert 1e-4 < error < 0.3
    assert found["followed_directions"] == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_by_themselves(copied, found):
    model, _ = compressed(Layers(), refresh=100)
    gradient(model, 0)
    twin, before = copied(model), found["leading_directions"]
    assert torch.equal(gradient(twin, 1), gradient(model, 1)) and found["leading_directions"] == before
    assert twin._kept_directions[0] is not model._kept_directions[0]
    assert torch.equal(twin._kept_directions[0].vectors, model._kept_directions[0].vectors)
