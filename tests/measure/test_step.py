"""What a measured step counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.measure.step import step_memory
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare

CPU = torch.device("cpu")


def test_weights_of_the_losses_are_kept_with_the_loss():
    config = compose_config("dataset=digits", "model.num_layers=2", "model.hidden_channels=16")
    problem = prepare(tiny_dataset(nodes=80), config.model, inductive=False, device=CPU)
    sizes = {"in_channels": problem.in_channels, "out_channels": problem.num_classes}
    net = build_model(config.model, **sizes, compression=config.compression)
    weighted = replace(problem, training=replace(problem.training, loss_weights=torch.rand(80)))
    kept = [step_memory(net, each, config, device=CPU, seed=0)["loss_mib"] for each in (problem, weighted)]
    assert (kept[1] - kept[0]) * 2**20 == pytest.approx(4 * problem.training.train.numel())
