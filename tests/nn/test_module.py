"""A class of the user's from the command line: what it is given, how it trains, what is wrong with it in one line."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch_geometric import nn as pyg

from conftest import relative_error, tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.errors import ConfigError
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.training import Optimization, evaluate, train_epochs

HERE = "model_of_a_user"


class Net(nn.Module):
    def __init__(self, nfeat, hidden_channels, nclass, heads=1, dropout=0.0):
        super().__init__()
        self.first = pyg.GATv2Conv(nfeat, hidden_channels, heads=heads, concat=False)
        self.second, self.norm = pyg.SAGEConv(hidden_channels, nclass), nn.LayerNorm(hidden_channels)
        self.dropout, self.heads = dropout, heads

    def forward(self, x, edge_index):
        x = F.gelu(self.norm(self.first(x, edge_index)))
        return self.second(F.dropout(x, self.dropout, self.training), edge_index)


class Wrong(Net):
    def forward(self, x, edge_index):
        return super().forward(x, edge_index).mean(0)


class Narrow(nn.Module):
    def __init__(self, width):
        super().__init__()


def not_a_module(in_channels, out_channels):
    return "a model"


@pytest.fixture(autouse=True)
def module(monkeypatch):
    monkeypatch.setitem(sys.modules, HERE, sys.modules[__name__])


def made(*overrides, target="Net"):
    config = compose_config("model=module", f"model.target={HERE}:{target}", "model.hidden_channels=32", *overrides)
    problem = prepare(tiny_dataset(nodes=101), config.model, inductive=False, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    )
    return config, problem, model


def gradient(problem, model, *, seed, map_seed=None):
    model.train().zero_grad()
    view = problem.training
    F.cross_entropy(model(view.x, view.graph, seed=seed, map_seed=map_seed), view.y).backward()
    return torch.cat([each.grad.flatten() for each in model.parameters()])


def test_a_class_is_given_what_it_has_parameters_for():
    config, problem, model = made("model.kwargs.heads=3", "model.dropout=0.25")
    assert model.net.heads == 3 and model.net.dropout == 0.25
    assert model.net.first.in_channels == problem.in_channels and model.net.norm.normalized_shape == (32,)
    assert config.model.name == "module_Net"
    named = compose_config("model=module", "model.target=torch_geometric.nn:GraphSAGE", "model.num_layers=4").model
    sage = build_model(named, in_channels=5, out_channels=2, compression=config.compression)
    assert len(sage.net.convs) == 4 and sage.net.convs[-1].out_channels == 2


@pytest.mark.parametrize("compression", ["none", "int4", "lowrank", "iexact"])
def test_it_trains_and_evaluates_exactly(compression):
    config, problem, model = made(f"compression={compression}", "training.epochs=25", "model.dropout=0.2")
    plain = made("compression=none")[2]
    plain.net.load_state_dict(model.net.state_dict())
    assert evaluate(model, problem) == evaluate(plain, problem)
    epochs = list(train_epochs(model, problem, Optimization(model, config.training), seed=1))
    assert epochs[-1].loss < 0.7 * epochs[0].loss


def test_steps_draw_from_their_seeds():
    """The same step twice is the same gradient; another seed of the maps rounds otherwise, with the same masks."""
    _, problem, model = made("compression=int4", "model.dropout=0.5")
    first = gradient(problem, model, seed=3)
    assert torch.equal(gradient(problem, model, seed=3), first)
    rounded = gradient(problem, model, seed=3, map_seed=8)
    assert not torch.equal(rounded, first) and relative_error(rounded, first) < 0.3
    assert relative_error(gradient(problem, model, seed=4), first) > 0.3


@pytest.mark.parametrize(
    ("target", "valid"),
    [
        ("Nothing", "cannot be imported: module .* has no attribute 'Nothing'"),
        ("Narrow", r"has no parameter for a width: name one of its parameters in_channels \(it has width\)"),
        ("not_a_module", "must make an nn.Module, and made a str"),
        ("HERE", "must be a class, or a function that makes a model"),
    ],
)
def test_what_is_wrong_with_a_class_is_one_line(target, valid):
    with pytest.raises(ConfigError, match=f"model.target={HERE}:{target}: {valid}") as error:
        made(target=target)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_wrong_with_its_arguments_or_its_output_is_one_line():
    with pytest.raises(ConfigError, match=r"cannot be made with .*, head=3: .*unexpected keyword argument 'head'"):
        made("model.kwargs.head=3")
    _, problem, model = made(target="Wrong")
    with pytest.raises(ConfigError, match=r"must return scores \(nodes, classes\), and returned shape \(3,\)"):
        model(problem.training.x, problem.training.graph)
    for target in ("net", "a.b:", ":Net", "a b:Net", "os.system('x'):y"):
        with pytest.raises(ConfigError, match="must be package.module:Class"):
            compose_config(
                "model=module", f"model.target='{target}'" if "'" not in target else f'model.target="{target}"'
            )
