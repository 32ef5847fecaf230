"""Figures of a training step and an evaluation: what is kept for the backward pass, peaks, and FP32 beside them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)

from iexact_runner.compression.seeds import mix
from iexact_runner.config import CompressionConfig, Config, GATConfig, ModelConfig, ModuleConfig
from iexact_runner.data.sparse import CSR
from iexact_runner.errors import TrainingError
from iexact_runner.loss import node_loss
from iexact_runner.measure import MIB, PeakMemory, SavedTensors, TensorRecord, Throughput, allocated, total_bytes
from iexact_runner.nn import Model, build_model
from iexact_runner.phases import is_out_of_memory
from iexact_runner.problem import Problem, loss_weights, training_input
from iexact_runner.schemes import Plain
from iexact_runner.training import Optimization, clock, evaluate, forward, step, train_on_batches, training_loss

# What tensors without memory raise where their numbers are asked for, or their kind is not known.
WITHOUT_NUMBERS = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
)
# Figures that only a step that is run can give.
UNKNOWN = ("loss_mib", "step_peak_mib", "evaluation_peak_mib", "data_mib", "model_mib", "reference_activation_mib")
# Beside what is kept, a step holds about so many maps of the widest kind at once, and kernels are compiled in so much.
PASSING_MAPS = 7
COMPILING_BYTES = 128 * MIB
# Steps of FP32 that are timed, and the seconds after which no further one begins.
FP32_STEPS, FP32_SECONDS = 5, 5.0


def step_memory(model: Model, problem: Problem, config: Config, *, device: torch.device, seed: int) -> dict[str, Any]:
    """The ``memory`` of a summary: figures of one training step that is not taken and of one evaluation, in MiB.

    Args:
        model: on the device; its running statistics move.
        problem: what it trains on.
        config: of the run.
        device: where.
        seed: of the step.
    """
    model.train()
    features, nodes = training_input(problem, seed=seed)
    before = allocated(device)
    with SavedTensors(model, excluded=[features, *problem.tensors()]) as saved:
        scores = forward(model, features, problem.training.graph, precision=config.precision, seed=seed)
        kept = saved.kept(scores)
        view = problem.training
        loss = node_loss(scores, view.y, nodes, kind=config.training.loss, weights=loss_weights(view, nodes))
        kept_with_loss = saved.kept(loss, beside=scores)
    after = allocated(device)
    reference = None
    if before is not None and after is not None:
        reference = (after - before - scores.nbytes - loss.nbytes) / MIB
    saved_bytes = sum(record.bytes for record in kept)
    plain = kept_tensors(config.model, problem, CompressionConfig(scheme="none"))
    del scores, loss
    return {
        "saved_mib": saved_bytes / MIB,
        "offloaded_mib": sum(record.host_bytes for record in kept) / MIB,
        "saved_mib_fp32": None if plain is None else sum(record.bytes for record in plain) / MIB,
        "loss_mib": (sum(record.bytes for record in kept_with_loss) - saved_bytes) / MIB,
        **_peaks(model, problem, config, device=device, seed=seed),
        "data_mib": total_bytes(problem.tensors()) / MIB,
        "model_mib": total_bytes([*model.parameters(), *model.buffers()]) / MIB,
        "reference_activation_mib": reference,
        "tensors": [record.to_dict() for record in kept],
    }


def fp32_figures(
    problem: Problem,
    config: Config,
    *,
    device: torch.device,
    seed: int,
    available: int | None,
    batch: Problem | None = None,
) -> dict[str, Any] | None:
    """The ``fp32`` of a summary: peaks and speed of the same model in FP32, from a few steps that are thrown away.

    Args:
        problem: what is trained on.
        config: of the run.
        device: where.
        seed: of the steps.
        available: bytes that may be allocated; None if that is not known.
        batch: the step on the largest mini-batch, if there are any.

    Returns:
        None if FP32 does not fit, or its loss is not finite.
    """
    plain, problem = CompressionConfig(scheme="none"), problem.without_cache()
    largest = batch or problem
    kept = kept_tensors(config.model, largest, plain)
    if kept is None:
        return None
    widest = max((record.bytes_fp32 for record in kept), default=0)
    needed = sum(record.bytes for record in kept) + PASSING_MAPS * widest
    if available is None or needed + COMPILING_BYTES > available:
        return None
    torch.manual_seed(seed)
    model = build_model(
        config.model, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=plain
    ).to(device)
    optimization = Optimization(model, config.training, precision=config.precision)

    def timed(epoch: int) -> float:
        start = clock(device)
        if problem.batches is None:
            step(model, optimization, problem, seed=mix(seed, epoch), epoch=epoch)
            return clock(device) - start
        train_on_batches(model, optimization, problem, epoch, seed=seed, most=FP32_STEPS)
        return (clock(device) - start) * len(problem.batches) / min(FP32_STEPS, len(problem.batches))

    seconds: list[float] = []
    try:
        peaks = _peaks(model, largest, config, device=device, seed=seed)
        while not seconds or (len(seconds) < FP32_STEPS and sum(seconds) < FP32_SECONDS):
            seconds.append(timed(1 + len(seconds)))
    except (MemoryError, RuntimeError) as error:
        if not (is_out_of_memory(error) or isinstance(error, TrainingError)):
            raise
        return None
    data = {"data_mib": total_bytes(problem.tensors()) / MIB}
    return peaks | data | Throughput.of(seconds, warmup_epochs=1).to_dict()


def _peaks(model: Model, problem: Problem, config: Config, *, device: torch.device, seed: int) -> dict[str, float]:
    """MiB that one training step and one evaluation allocate at once, beyond what is there before them."""
    step_peak = step_peak_mib(model, problem, config, device=device, seed=seed)
    with PeakMemory(device) as of_evaluation:
        evaluate(model, problem, precision=config.precision)
    model.train()
    return {"step_peak_mib": step_peak, "evaluation_peak_mib": of_evaluation.bytes / MIB}


def step_peak_mib(model: Model, problem: Problem, config: Config, *, device: torch.device, seed: int) -> float:
    """MiB that one training step allocates at once, beyond what is there before it."""
    model.train()
    with PeakMemory(device) as peak:
        training_loss(model, problem, kind=config.training.loss, precision=config.precision, seed=seed).backward()
    return peak.bytes / MIB


def saved_mib(model: Model, problem: Problem, config: Config, *, seed: int) -> float:
    """MiB that one training step keeps for its backward pass."""
    model.train()
    features, _ = training_input(problem, seed=seed)
    with SavedTensors(model, excluded=[features, *problem.tensors()]) as saved:
        scores = forward(model, features, problem.training.graph, precision=config.precision, seed=seed)
        return sum(record.bytes for record in saved.kept(scores)) / MIB


def kept_tensors(
    config: ModelConfig, problem: Problem, compression: CompressionConfig, *, precision: str = "float32"
) -> list[TensorRecord] | None:
    """What training of a model keeps, found by a forward pass over tensors that have no memory.

    None if a module of the user's looks at numbers, which such tensors do not have.
    """
    features, graph = training_input(problem, seed=0)[0], problem.training.graph
    if isinstance(config, GATConfig) and isinstance(graph, CSR):
        # How many edges are left is a number, which tensors without memory do not have.
        graph = Plain(training=True, seed=0).drop_edges(graph, config.edge_dropout)
        config = replace(config, edge_dropout=0.0)
    # A kernel that torch has no rule of shapes for would run on real zeros.
    fake = FakeTensorMode(allow_fallback_kernels=False)
    with nullcontext() if isinstance(config, ModuleConfig) else fake, torch.random.fork_rng(devices=[]):
        # A module of the user's is made of real weights, for it may copy them, which is not possible without memory.
        with torch.device("cpu" if isinstance(config, ModuleConfig) else features.device):
            model = build_model(
                config, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=compression
            )
    if isinstance(config, ModuleConfig):
        _give_up_memory(model, fake, features.device)
    with fake:
        features, graph = fake.from_tensor(features), graph.map(fake.from_tensor)
        try:
            with SavedTensors(model, excluded=[features, *graph.tensors()]) as saved:
                return saved.kept(forward(model, features, graph, precision=precision))
        except WITHOUT_NUMBERS:
            if not isinstance(config, ModuleConfig):
                raise
            return None


def _give_up_memory(model: nn.Module, fake: FakeTensorMode, device: torch.device) -> None:
    """Puts tensors without memory in place of the weights and statistics of a model; what is shared stays shared."""
    known: dict[int, Tensor] = {}

    def faked(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            without = fake.from_tensor(tensor.detach()).to(device)
            is_weight = isinstance(tensor, nn.Parameter)
            known[id(tensor)] = nn.Parameter(without, tensor.requires_grad) if is_weight else without
        return known[id(tensor)]

    originals = [*model.parameters(), *model.buffers()]  # held, so that no other tensor takes an id of theirs
    for module in model.modules():
        held: Any
        for held in (module._parameters, module._buffers):
            held.update({name: faked(tensor) for name, tensor in held.items() if tensor is not None})
    del originals
