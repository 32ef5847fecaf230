"""Figures of one training step: what it keeps for the backward pass, and its peak."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from iexact_runner import measure
from iexact_runner.config import CompressionConfig, Config, GATConfig, ModelConfig
from iexact_runner.data.sparse import CSR
from iexact_runner.loss import node_loss
from iexact_runner.measure import TensorRecord
from iexact_runner.measure.peak import PeakMemory
from iexact_runner.nn import Model, build_model
from iexact_runner.schemes import Plain
from iexact_runner.training import Problem, autocast, training_input, training_loss

# Figures that only a step that is run can give.
UNKNOWN = ("loss_mib", "step_peak_mib", "data_mib", "model_mib", "reference_activation_mib")


def step_memory(model: Model, problem: Problem, config: Config, *, device: torch.device, seed: int) -> dict[str, Any]:
    """The ``memory`` of a summary: figures of one training step that is not taken, in MiB.

    Args:
        model: on the device; its running statistics move.
        problem: what it trains on.
        config: of the run.
        device: where.
        seed: of the step.
    """
    model.train()
    features, nodes = training_input(problem, seed=seed)
    before = measure.allocated(device)
    with measure.SavedTensors(model, excluded=[features, *problem.tensors()]) as saved:
        with autocast(config.precision, device):
            scores = model(features, problem.training.graph, seed=seed)
        kept = saved.kept(scores)
        loss = node_loss(scores, problem.training.y, nodes, kind=config.training.loss)
        kept_with_loss = saved.kept(loss, beside=scores)
    after = measure.allocated(device)
    reference = None
    if before is not None and after is not None:
        reference = (after - before - scores.nbytes - loss.nbytes) / measure.MIB
    saved_bytes = sum(record.bytes for record in kept)
    plain = kept_tensors(config.model, problem, CompressionConfig(scheme="none"))
    del scores, loss
    with PeakMemory(device) as peak:
        training_loss(model, problem, kind=config.training.loss, precision=config.precision, seed=seed).backward()
    return {
        "saved_mib": saved_bytes / measure.MIB,
        "saved_mib_fp32": sum(record.bytes for record in plain) / measure.MIB,
        "loss_mib": (sum(record.bytes for record in kept_with_loss) - saved_bytes) / measure.MIB,
        "step_peak_mib": peak.bytes / measure.MIB,
        "data_mib": measure.total_bytes(problem.tensors()) / measure.MIB,
        "model_mib": measure.total_bytes([*model.parameters(), *model.buffers()]) / measure.MIB,
        "reference_activation_mib": reference,
        "tensors": [record.to_dict() for record in kept],
    }


def kept_tensors(config: ModelConfig, problem: Problem, compression: CompressionConfig) -> list[TensorRecord]:
    """What training of a model keeps, found by a forward pass over tensors that have no memory."""
    features, graph = training_input(problem, seed=0)[0], problem.training.graph
    if isinstance(config, GATConfig) and isinstance(graph, CSR):
        # How many edges are left is a number, which tensors without memory do not have.
        graph = Plain(training=True, seed=0).drop_edges(graph, config.edge_dropout)
        config = replace(config, edge_dropout=0.0)
    # A kernel that torch has no rule of shapes for would run on real zeros.
    with FakeTensorMode(allow_fallback_kernels=False) as fake:
        features, graph = fake.from_tensor(features), graph.map(fake.from_tensor)
        with torch.device(features.device):
            model = build_model(
                config, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=compression
            )
        with measure.SavedTensors(model, excluded=[features, *graph.tensors()]) as saved:
            return saved.kept(model(features, graph))
