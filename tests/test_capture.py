"""Captured training steps: the same numbers as without, whatever has to be captured anew.

A graph is stood in for by work that is done again into the same tensors; scripts/bench/gpu_suite.py captures on a GPU.
"""

from __future__ import annotations

import itertools
import logging
import math

import pytest
import torch

from conftest import FP32, projected, tiny_dataset
from iexact_runner import capture
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.compression.seeds import mix
from iexact_runner.config import CompressionConfig, DeeperGCNConfig, GATConfig, GCN2Config, SAGEConfig, TrainingConfig
from iexact_runner.errors import TrainingError
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.training import Optimization, step, stepper

FIELDS = dict(num_layers=3, hidden_channels=16, dropout=0.4)
MODELS = {
    "sage": SAGEConfig(name="sage", **FIELDS),
    "gcn2": GCN2Config(name="gcn2", residual=True, **FIELDS),
    "gat": GATConfig(name="gat", attention_dropout=0.2, **FIELDS),
    "deepergcn": DeeperGCNConfig(name="deepergcn", **FIELDS),
}
REFRESH, EPOCHS = 5, 14
SCHEMES = {
    "none": FP32,
    "exact": projected(bits=2, kept_frac=0.5),
    "lowrank": CompressionConfig(scheme="lowrank", map_bits=24, refresh=REFRESH),
}


class Replayed:
    """Does the recorded work again; as under a capture, recording it computes nothing."""

    def __init__(self, work, captured, wrong):
        self.work, self.captured, self.wrong = work, captured, wrong
        moved = [(each, each.clone()) for each in captured._moved()]
        states = [(state, state.vectors) for state in captured._directions()]
        self.ages = [state.age for state, _ in states]
        work()
        for each, value in moved:
            each.copy_(value)
        for state, vectors in states:
            state.vectors = vectors
        self.outcome, self.gradients = captured._outcome, captured._gradients
        self.vectors = [vectors for _, vectors in states]

    def replay(self):
        captured, directions = self.captured, self.captured._directions()
        ages = [state.age for state in directions]
        for state, age in zip(directions, self.ages, strict=True):
            state.age = age  # nothing but work of the device is done again
        for parameter in captured._parameters:
            parameter.grad = None
        self.work()
        self.outcome.copy_(captured._outcome)
        for gradient, found in zip(self.gradients, captured._gradients, strict=True):
            gradient.copy_(found)
        captured._outcome, captured._gradients = self.outcome, self.gradients
        for state, age, vectors in zip(directions, ages, self.vectors, strict=True):
            vectors.copy_(state.vectors)
            state.vectors, state.age = vectors, age
        self.outcome[1] = float(next(self.wrong))


def problem_of(model, compression, **training):
    problem = prepare(tiny_dataset(nodes=80), model, inductive=False, device=torch.device("cpu"))
    torch.manual_seed(0)
    net = build_model(model, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=compression)
    return net, Optimization(net, TrainingConfig(**training)), problem


def captured_step(monkeypatch, net, optimization, problem, *, fails=()):
    """A captured step, of whose replays those of the numbers ``fails`` have not enough room."""
    captured = stepper(net, optimization, problem)
    wrong = (number in fails for number in itertools.count())
    monkeypatch.setattr(capture, "Recording", lambda work: Replayed(work, captured, wrong))
    return captured


def trained(take, net):
    losses = [take(seed=mix(7, epoch), epoch=epoch) for epoch in range(1, EPOCHS + 1)]
    return losses, net.state_dict()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("fails", [(), (0, 4)], ids=["", "no room"])
def test_losses_and_weights_are_those_of_steps_that_are_not_captured(model, scheme, fails, monkeypatch):
    if scheme == "none":  # whose dropout is PyTorch's own
        monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *args, **kwargs: x)
    net, optimization, problem = problem_of(MODELS[model], SCHEMES[scheme])
    losses, state = trained(lambda **epoch: step(net, optimization, problem, **epoch), net)
    net, optimization, problem = problem_of(MODELS[model], SCHEMES[scheme], cuda_graph=True)
    captured = captured_step(monkeypatch, net, optimization, problem, fails=fails)
    found, weights = trained(captured, net)
    assert found == losses
    assert all(torch.equal(weights[key], value) for key, value in state.items())
    renewed = 2 if scheme == "lowrank" else 0  # in epochs 6 and 11; the first is one of the warm-up
    assert captured.replays == EPOCHS - capture.WARM_UP - renewed - len(fails)


@pytest.mark.parametrize("after", [1, 6, 8])
def test_a_new_plan_is_captured_anew(after, monkeypatch):
    """After a plain step, one that found directions, and replays."""
    choices = [Choice(40, 2.0, 0.5), Choice(8, blockwise=True), Choice(16)]
    compression = CompressionConfig(scheme="auto", budget=0.2, refresh=REFRESH)

    def planned(take, net):
        losses = []
        for epoch in range(1, EPOCHS + 1):
            losses.append(take(seed=mix(7, epoch), epoch=epoch))
            if epoch == after:
                net.directions[:] = [Directions(choice=choice) for choice in choices[: len(net.directions)]]
        return losses, net.state_dict()

    net, optimization, problem = problem_of(MODELS["sage"], compression)
    losses, state = planned(lambda **epoch: step(net, optimization, problem, **epoch), net)
    net, optimization, problem = problem_of(MODELS["sage"], compression, cuda_graph=True)
    captured = captured_step(monkeypatch, net, optimization, problem)
    found, weights = planned(captured, net)
    assert found == losses and all(torch.equal(weights[key], value) for key, value in state.items())
    assert 0 < captured.replays <= EPOCHS - 2 * capture.WARM_UP + (after == 1)


def test_a_loss_that_is_not_finite_leaves_the_weights(monkeypatch):
    net, optimization, problem = problem_of(MODELS["sage"], SCHEMES["exact"], cuda_graph=True)
    captured = captured_step(monkeypatch, net, optimization, problem)
    for epoch in range(1, 5):
        captured(seed=epoch, epoch=epoch)
    assert captured.replays == 2
    before = {key: value.clone() for key, value in net.named_parameters()}
    problem.training.x.fill_(math.nan)
    with pytest.raises(TrainingError, match="the training loss is nan at epoch 5"):
        captured(seed=5, epoch=5)
    assert all(torch.equal(value, before[key]) for key, value in net.named_parameters())


def test_a_step_that_cannot_be_captured_is_taken_without_a_graph(monkeypatch, caplog):
    net, optimization, problem = problem_of(MODELS["sage"], SCHEMES["lowrank"])
    losses, _ = trained(lambda **epoch: step(net, optimization, problem, **epoch), net)
    net, optimization, problem = problem_of(MODELS["sage"], SCHEMES["lowrank"], cuda_graph=True)
    captured = captured_step(monkeypatch, net, optimization, problem)

    def refused(work):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(capture, "Recording", refused)
    with caplog.at_level(logging.WARNING):
        found, _ = trained(captured, net)
    assert found == losses and captured.replays == 0
    assert [record.message for record in caplog.records] == [
        "training.cuda_graph: this step cannot be captured, and is taken without a graph: "
        "operation not permitted when stream is capturing"
    ]
