"""What training would need and yield under each option, before any of it is run at its full size.

What is kept is counted on tensors without memory. Peaks and times are those of real steps on smaller graphs with as
many edges a node. Both grow in proportion to the nodes, and so are extended along a line; a graph that is small itself
is measured as it is. Gradient errors are taken on a part of the graph, beside the exact gradient of that part.

Shapes: N nodes, n nodes of a sample.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from iexact_runner.analysis.budgets import plan_training
from iexact_runner.analysis.fidelity import Deviations, exact_twin, gradients, joined
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.compression.seeds import mix
from iexact_runner.config import Config
from iexact_runner.config.presets import preset
from iexact_runner.data.graph import Adjacency, Edges, Graph, training_subgraph
from iexact_runner.errors import ConfigError
from iexact_runner.measure import MIB, total_bytes
from iexact_runner.measure.peak import PeakMemory
from iexact_runner.measure.step import kept_tensors, step_peak_mib
from iexact_runner.nn import Model, build_model, model_class_of
from iexact_runner.problem import Problem, View, caches_first_aggregate, first_aggregate_bytes
from iexact_runner.training import Optimization, clock, evaluate, step

# Options by name: fields of the command line, of which the preset has that name unless it is given.
OPTIONS: dict[str, dict[str, str]] = {
    "none": {},
    "bfloat16": {"compression": "none", "precision": "bfloat16"},
    **{name: {} for name in ("recompute", "offload", "int8", "lowrank_fine", "int4", "lowrank", "lowrank_small")},
    **{name: {} for name in ("actnn", "iexact")},
    **{f"auto, {share:.0%}": {"compression": "auto", "compression.budget": f"{share:g}"} for share in (0.2, 0.05)},
}
# Steps that are timed, draws of a gradient, and exact epochs before them.
TIMED_STEPS, DRAWS, EPOCHS = 3, 3, 10
# Peaks are measured on graphs of at most so many times the nodes that are timed, and with so much kept by FP32.
PEAK_SAMPLES, SAMPLED_MIB = 4, 1024
# Gradients that a budget is dealt by, beside those of its plans.
TRIALS_OF_MAPS = 6
# Beside the weights, the optimizer holds two of their size.
OPTIMIZER_COPIES = 2


class Forecast(NamedTuple):
    """What one option comes to.

    Args:
        name: of the option.
        overrides: what chooses it on the command line.
        saved_mib: kept on the device for the backward pass.
        offloaded_mib: kept on the host.
        step_peak_mib: that a step allocates at once; likewise ``evaluation_peak_mib``.
        total_mib: with the data, the model and its optimizer.
        time: of a step and an evaluation, FP32's being 1.
        seconds: of the same at full size.
        error: relative error of the gradient; None if it could not be taken.
        fits: whether the total is free.
    """

    name: str
    overrides: str
    saved_mib: float
    offloaded_mib: float
    step_peak_mib: float
    evaluation_peak_mib: float
    total_mib: float
    time: float
    seconds: float
    error: float | None
    fits: bool | None


class _Peaks(NamedTuple):
    """What a step and an evaluation allocate at once in MiB, and the share of FP32's bytes that a plan keeps."""

    step: float
    evaluation: float
    kept_share: float | None


def forecasts(
    problem: Problem, config: Config, *, device: torch.device, nodes: int, available_mib: float | None, seed: int
) -> list[Forecast]:
    """The options, in the order of ``OPTIONS``; those that a model cannot train under are left out.

    Args:
        problem: that of a step, at its full size.
        config: of the run, whose compression and precision the options replace.
        device: where.
        nodes: of the largest graph that is timed, of which half hold the rows that directions are found from; peaks
            are measured on more. A graph that is no larger is taken whole.
        available_mib: that may be used; None if that is not known.
        seed: of samples and weights.
    """
    size = max(problem.training.x.size(0), problem.whole.x.size(0))
    whole = problem.without_cache()

    @functools.cache
    def sample(count: int) -> Problem:
        return whole if count >= size else smaller(problem, config, count, seed=seed)

    timed = sample(nodes)
    part = timed if nodes >= size else part_of(problem, config, nodes, seed=seed)
    samples = [sample(count) for count in _sizes(whole, config, nodes=nodes, size=size)]
    trained, scored = zip(*map(_nodes, samples), strict=True)
    errors = _errors(part, config, device=device, seed=seed)
    features, data = whole.whole.x.nbytes, total_bytes(whole.tensors())
    free = None if available_mib is None else int(available_mib * MIB) - data  # with the data loaded
    rows: list[Forecast] = []
    for name, fields in OPTIONS.items():
        chosen = _chosen(config, name)
        try:
            seconds = _seconds(timed, chosen, device=device, seed=seed) * size / max(_nodes(timed))
            peaks = [_peaks(each, chosen, device=device, seed=seed) for each in samples]
            share = peaks[0].kept_share
            counted = chosen.compression if share is None else preset("none")
            kept = kept_tensors(config.model, whole, counted, precision=chosen.precision) or ()
            cached = caches_first_aggregate(chosen, features, available=free)
        except ConfigError:
            continue
        step_peak = _extended([each.step for each in peaks], trained, _nodes(problem)[0])
        evaluation = _extended([each.evaluation for each in peaks], scored, _nodes(problem)[1])
        model = _model(problem, chosen, seed=seed)
        weights = total_bytes([*model.parameters(), *model.buffers()])
        resident = (data + (1 + OPTIMIZER_COPIES) * weights) / MIB
        if cached:
            resident += first_aggregate_bytes(chosen, features) / MIB
        total = resident + max(step_peak, evaluation)
        baseline = rows[0].seconds if rows else seconds
        overrides = {"compression": name} | fields
        rows.append(
            Forecast(
                name,
                " ".join(f"{field}={value}" for field, value in overrides.items()),
                (1.0 if share is None else share) * sum(record.bytes for record in kept) / MIB,
                sum(record.host_bytes for record in kept) / MIB,
                step_peak,
                evaluation,
                total,
                seconds / baseline,
                seconds,
                errors.get(name),
                None if available_mib is None else total <= available_mib,
            )
        )
    return rows


def _sizes(problem: Problem, config: Config, *, nodes: int, size: int) -> list[int]:
    """Nodes of the graphs that peaks are measured on: the graph itself, or a large one and half of it.

    Large enough that what is worked on in runs of a fixed size, which small graphs take at once, does not show.
    """
    kept = sum(record.bytes for record in kept_tensors(config.model, problem, preset("none")) or ())
    affordable = int(SAMPLED_MIB * MIB * size / max(kept, 1))
    largest = min(max(nodes, min(affordable, PEAK_SAMPLES * nodes)), size)
    return [size] if largest == size else [largest, largest // 2]


def recommended(rows: Sequence[Forecast]) -> Forecast | None:
    """FP32 if it fits; else, of what fits, the least time, lengthened by its gradient error."""
    fitting = [row for row in rows if row.fits is not False]
    if not fitting or fitting[0].name == "none":
        return fitting[0] if fitting else None
    return min(fitting, key=lambda row: row.time * (1 + (row.error or 0.0)))


def smaller(problem: Problem, config: Config, nodes: int, *, seed: int) -> Problem:
    """A problem with fewer nodes and as many edges a node, whose neighbours are drawn anew.

    Sizes are all that it has of the graph: it is for memory and time.
    """
    largest = max(problem.training.x.size(0), problem.whole.x.size(0))
    build = model_class_of(config.model).build_graph

    def view(full: View) -> View:
        count = max(2, round(nodes * full.x.size(0) / largest))
        generator = torch.Generator().manual_seed(mix(seed, count) % 2**62)
        chosen = torch.randperm(full.x.size(0), generator=generator)[:count].to(full.x.device)
        sources, targets = _edges(full.graph)
        place = torch.full((full.x.size(0),), -1, dtype=torch.int64, device=full.x.device)
        place[chosen] = torch.arange(count, device=full.x.device)
        inside = (place[targets] >= 0) & (sources != targets)  # a model adds loops of its own
        edges = torch.stack([sources[inside] % count, place[targets[inside]]])
        return _view(full, chosen, build(edges, count))

    return _problem(problem, view)


def part_of(problem: Problem, config: Config, nodes: int, *, seed: int) -> Problem:
    """The problem on the nodes that are nearest to a few drawn ones, with all edges between them."""
    build = model_class_of(config.model).build_graph

    def view(full: View) -> View:
        count = full.x.size(0)
        sources, targets = _edges(full.graph)
        near = torch.zeros(count, dtype=torch.bool, device=full.x.device)
        generator = torch.Generator().manual_seed(mix(seed) % 2**62)
        near[torch.randperm(count, generator=generator)[: max(1, nodes // 64)].to(near.device)] = True
        while (reached := int(near.sum())) < min(nodes, count):
            near[sources[near[targets]]] = True
            if int(near.sum()) == reached:
                break
        chosen = near.nonzero().flatten()
        if chosen.numel() > nodes:
            chosen = chosen[torch.randperm(chosen.numel(), generator=generator)[:nodes].to(chosen.device)].sort().values
        proper = sources != targets  # a model adds loops of its own
        edges = training_subgraph(torch.stack([sources[proper], targets[proper]]), chosen, count)
        return _view(full, chosen, build(edges, chosen.numel()))

    return _problem(problem, view)


def _problem(problem: Problem, view: Any) -> Problem:
    training = view(problem.training)
    whole = view(problem.whole) if problem.inductive else training
    some = torch.arange(min(8, whole.x.size(0)), device=whole.x.device)
    return replace(problem, training=training, whole=whole, val=some, test=some, batches=None)


def _view(full: View, chosen: Tensor, graph: Graph) -> View:
    """The view of some nodes, of which as large a share is trained on."""
    share = full.train.numel() / full.x.size(0)
    trained = max(1, round(share * chosen.numel()))
    return View(full.x[chosen], full.y[chosen], graph, torch.arange(trained, device=full.x.device))


def _edges(graph: Graph) -> tuple[Tensor, Tensor]:
    """Sources and targets (E,) of a graph's edges."""
    if isinstance(graph, Edges):
        return graph.edge_index[0].long(), graph.edge_index[1].long()
    matrix = graph.matrix if isinstance(graph, Adjacency) else graph
    return matrix.columns.long(), matrix.rows()


def _nodes(problem: Problem) -> tuple[int, int]:
    return problem.training.x.size(0), problem.whole.x.size(0)


def _chosen(config: Config, name: str) -> Config:
    """The configuration under an option."""
    fields = OPTIONS[name]
    own = {field.split(".")[1]: float(value) for field, value in fields.items() if field.startswith("compression.")}
    compression = preset(fields.get("compression", name), backend=config.compression.backend, **own)
    precision = fields.get("precision", "float32")
    return replace(config, compression=compression, precision=precision, task="measure", runs=1)


def _model(problem: Problem, config: Config, *, seed: int) -> Model:
    torch.manual_seed(seed)
    return build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=config.compression,
    ).to(problem.training.x.device)


def _seconds(problem: Problem, config: Config, *, device: torch.device, seed: int) -> float:
    """Of a step and an evaluation."""
    model, _ = _planned(problem, config, seed=seed)
    optimization = Optimization(model, config.training, precision=config.precision)

    def epoch(number: int) -> float:
        start = clock(device)
        step(model, optimization, problem, seed=mix(seed, number), epoch=number)
        evaluate(model, problem, precision=config.precision)
        return clock(device) - start

    epoch(1)  # compiles, and makes the optimizer's state
    return statistics.median(epoch(2 + number) for number in range(TIMED_STEPS))


def _peaks(problem: Problem, config: Config, *, device: torch.device, seed: int) -> _Peaks:
    """Of a step after a first one, and of an evaluation."""
    model, share = _planned(problem, config, seed=seed)
    step(model, Optimization(model, config.training, precision=config.precision), problem, seed=seed, epoch=1)
    model.zero_grad(set_to_none=True)
    peak = step_peak_mib(model, problem, config, device=device, seed=seed)
    model.zero_grad(set_to_none=True)
    with PeakMemory(device) as evaluation:
        evaluate(model, problem, precision=config.precision)
    return _Peaks(peak, evaluation.bytes / MIB, share)


def _planned(problem: Problem, config: Config, *, seed: int) -> tuple[Model, float | None]:
    """A new model, and the share of FP32's bytes that the plan of its budget keeps, if it has one."""
    model = _model(problem, config, seed=seed)
    if config.compression.scheme != "auto":
        return model, None
    plan = plan_training(model, problem, config, seed=seed, trials=0)
    model.directions[:] = plan.directions()
    return model, plan.saved / plan.budget * cast(float, config.compression.budget)


def _extended(values: Sequence[float], sizes: Sequence[int], size: int) -> float:
    """A figure at another size, on the line through those of two, or the figure of the only one there is."""
    if len(values) == 1 or sizes[0] == sizes[1]:
        return values[0]
    slope = (values[0] - values[1]) / (sizes[0] - sizes[1])
    return values[0] + slope * (size - sizes[0])


def _errors(problem: Problem, config: Config, *, device: torch.device, seed: int) -> dict[str, float]:
    """Relative gradient errors by option, after a few exact epochs on a part of the graph."""
    errors: dict[str, float] = {}
    exact = _chosen(config, "none")
    twin = exact_twin(preset("none"))
    model = _model(problem, replace(exact, compression=twin), seed=seed)
    optimization = Optimization(model, config.training)
    for number in range(1, EPOCHS + 1):
        step(model, optimization, problem, seed=mix(seed, number), epoch=number)
    for name in OPTIONS:
        chosen = _chosen(config, name)
        if chosen.compression.scheme in ("none", "recompute") and chosen.precision == "float32":
            errors[name] = 0.0
            continue
        compared = twin if chosen.compression.scheme == "none" else chosen.compression
        deviations, kind, masks = Deviations(), config.training.loss, mix(seed, 0)
        choices: list[Choice] = []
        try:
            if compared.scheme == "auto":
                choices = plan_training(model, problem, chosen, seed=mix(seed, DRAWS), trials=TRIALS_OF_MAPS).choices()
            for draw in range(DRAWS):
                probe = copy.deepcopy(model)
                true = gradients(probe, problem, kind=kind, seed=masks)
                probe.compression, own = compared, mix(seed, draw)
                probe.directions = [Directions(choice=choice) for choice in choices]
                found = gradients(probe, problem, kind=kind, precision=chosen.precision, seed=masks, map_seed=own)
                deviations.add(joined(found), joined(true))
        except ConfigError:
            continue
        error = deviations.figures(whole=0.0)["relative_error"]
        if error is not None:
            errors[name] = error
    return errors
