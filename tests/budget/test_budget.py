"""``compression=auto``: a budget is kept, dealt where it matters, and frozen between measurements."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import nn
from torch_geometric.nn import GATConv, GCNConv, SAGEConv

from iexact_runner import compress, deal_budget
from iexact_runner.analysis.budgets import TrainingTrial, plan_training
from iexact_runner.budget import make_plan
from iexact_runner.budget.planner import _with_signs
from iexact_runner.budget.sites import ELEMENT_BITS, Site, Way, grid
from iexact_runner.cli import compose_config
from iexact_runner.compression.choices import UNPLANNED, Choice
from iexact_runner.compression.coefficients import directions_for
from iexact_runner.compression.directions import Directions
from iexact_runner.config.presets import preset
from iexact_runner.data import load_dataset
from iexact_runner.errors import ConfigError, UserError
from iexact_runner.experiment import Experiment
from iexact_runner.measure import MIB, SavedTensors
from iexact_runner.measure.step import saved_mib
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.report import figures
from iexact_runner.report.reading import read_report
from iexact_runner.runs.labels import compression_label
from iexact_runner.runs.records import RunFolder, read_run
from iexact_runner.schemes.lowrank import LowRank
from iexact_runner.tasks import planner, train

MODELS = ("sage", "gcn", "gcn2", "gat", "deepergcn")
# Which keep so much in FP32 that all their sketches fit into a small share of it.
WIDE = ("gat", "deepergcn")
SIZES = ("dataset=synthetic", "dataset.num_nodes=600", "dataset.num_features=20", "model.hidden_channels=32")
SIZES += ("model.num_layers=3",)


def prepared(*overrides):
    config = compose_config(*SIZES, "compression=auto", "compression.budget=0.1", *overrides)
    problem = prepare(load_dataset(config.dataset), config.model, inductive=False, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(
        config.model, in_channels=problem.in_channels, out_channels=problem.num_classes, compression=config.compression
    )
    return model, problem, config


def gradient_error(model, problem, config, directions, *, seed=3):
    trial = TrainingTrial(model, problem, config, seed=seed)
    exact = [Directions(choice=Choice(None)) for _ in directions]
    true, _ = trial.gradient(exact)
    estimate, _ = trial.gradient(directions)
    return ((estimate - true).norm() / true.norm()).item()


@pytest.mark.parametrize("name", MODELS)
def test_a_step_keeps_at_most_the_budget_and_nearly_all_of_it(name):
    model, problem, config = prepared(f"model={name}")
    least = None
    for share in (0.02, 0.05, 0.1, 0.3):
        changed = dataclasses.replace(config.compression, budget=share)
        each = dataclasses.replace(config, compression=changed)
        try:
            plan = plan_training(model, problem, each, seed=1)
        except ConfigError as error:
            least = str(error)
            continue
        model.directions[:] = plan.directions()
        kept = saved_mib(model, problem, each, seed=1)
        model.directions.clear()
        assert kept == pytest.approx(plan.saved / MIB)
        assert plan.saved <= plan.budget
        full = all(planned.choice.bits is None or planned.choice.bits >= 8 * planned.shape[1] for planned in plan.maps)
        assert full or plan.saved >= 0.6 * plan.budget  # a map of low rank has nothing to gain beyond
    assert least is None or "a step keeps at least" in least


@pytest.mark.parametrize("name", MODELS)
def test_more_bytes_mean_less_error(name):
    model, problem, config = prepared(f"model={name}")
    errors = []
    for share in (0.02, 0.04, 0.08) if name in WIDE else (0.1, 0.2, 0.5):
        each = dataclasses.replace(config, compression=dataclasses.replace(config.compression, budget=share))
        plan = plan_training(model, problem, each, seed=1)
        errors.append(gradient_error(model, problem, each, plan.directions(), seed=1))
    assert errors[0] > errors[1] > errors[2] or errors[1:] == [0, 0]


@pytest.mark.parametrize("name", ["sage", "gcn", "gcn2"])
def test_the_error_is_about_the_expected_one(name):
    model, problem, config = prepared(f"model={name}", "model.dropout=0.2")
    plan = plan_training(model, problem, config, seed=1)
    assert plan.evaluations == 4 + 2 * len(plan.maps)
    actual = gradient_error(model, problem, config, plan.directions(), seed=1)
    assert plan.measured_error == pytest.approx(actual, rel=1e-3)
    assert 0.4 * plan.error < actual < 2.5 * plan.error


@pytest.mark.parametrize("name", ["sage", "gcn", "gcn2", "gat"])
@pytest.mark.parametrize("fixed", ["lowrank", "lowrank_fine"])
def test_it_is_no_worse_than_a_preset_of_as_many_bytes(name, fixed):
    model, problem, config = prepared(f"model={name}")
    model.compression = preset(fixed)
    size = saved_mib(model, problem, config, seed=1)
    model.directions.clear()
    model.compression = config.compression
    changed = dataclasses.replace(config.compression, budget=None, budget_mib=size)
    config = dataclasses.replace(config, compression=changed)
    plan = plan_training(model, problem, config, seed=1)
    assert plan.saved <= size * MIB
    trial = TrainingTrial(model, problem, dataclasses.replace(config, compression=preset(fixed)), seed=1)
    exact, _ = TrainingTrial(model, problem, config, seed=1).gradient(
        [Directions(choice=Choice(None)) for _ in plan.maps]
    )
    other = ((trial.gradient([])[0] - exact).norm() / exact.norm()).item()
    assert gradient_error(model, problem, config, plan.directions(), seed=1) <= 1.1 * other


def test_the_exact_choice_is_exact():
    model, problem, config = prepared()
    trial = TrainingTrial(model, problem, config, seed=1)
    maps = [Directions(choice=Choice(None)) for _ in range(2)]
    kept, _ = trial.gradient(maps)
    plain = dataclasses.replace(config, compression=preset("exact", bits=None, kept_frac=1.0, share_maps=True))
    exact, _ = TrainingTrial(model, problem, plain, seed=1).gradient([])
    assert (kept - exact).norm() <= 1e-5 * exact.norm()


def test_groups_of_maps_are_tried_together_where_gradients_are_few():
    model, problem, config = prepared("model=gcn2", "model.num_layers=6")
    plans = {trials: plan_training(model, problem, config, seed=1, trials=trials) for trials in (0, 2, 4, None)}
    count = len(plans[0].maps)
    assert count > 5
    assert [plan.evaluations for plan in plans.values()] == [0, 6, 8, 4 + 2 * count]
    assert plans[0].error is None and all(plans[trials].error for trials in (2, 4, None))
    assert all(plan.saved <= plan.budget for plan in plans.values())


def test_a_budget_below_the_least_names_it():
    model, problem, config = prepared("compression.budget=null", "compression.budget_mib=0.001")
    with pytest.raises(ConfigError, match=r"^compression.budget_mib=0.00 MiB: a step keeps at least 0\.\d\d MiB$"):
        plan_training(model, problem, config, seed=1)


def test_bits_of_a_sketch_reach_eight_a_column():
    assert grid(1) == [8] and grid(3) == [8, 16, 24]
    for width in (16, 100, 256):
        bits = grid(width)
        assert bits[-1] == 8 * width and bits == sorted(set(bits)) and all(each % 8 == 0 for each in bits)


def sketched(z, choice):
    """A map kept in one of its options."""
    return LowRank(preset("auto"), seed=0, directions=[Directions(choice=choice)])._kept_sketch(z)


def sketched_error(z, choice):
    """Share of the energy of a map that its sketch misses."""
    layout, tensors = sketched(z, choice)
    error = layout.decode(tensors) - z
    return (error.square().sum() / (z - z.mean(0)).square().sum()).item()


def test_what_a_sketch_would_miss_is_what_it_misses():
    torch.manual_seed(0)
    z = torch.randn(900, 24) @ torch.diag(torch.linspace(0.05, 3.0, 24))
    z[::10, 0] += 3.0  # far from the other rows in a column that hardly varies
    site = Site()
    sample = z - z.mean(0)
    site.observe(z, sample, z.mean(0))
    for way in (way for way in site.ways if way.choice.sign_threshold is None and way.choice.bits):
        assert sketched_error(z, way.choice) == pytest.approx(way.missed, rel=0.2), way.choice
    assert all(0 <= way.missed <= 1 and 0 <= way.wrong <= 1 for way in site.ways)
    assert all(way.wrong == 0 for way in site.ways if way.choice.sign_threshold is None)
    blocks = {way.choice.bits: way.missed for way in site.ways if way.choice.blockwise}
    assert blocks[2] > blocks[4] > blocks[8] > blocks[16] > 0
    # A node's range in the columns is no wider for the one that hardly varies.
    assert blocks[4] < 0.02 and blocks[8] < 1e-4 and blocks[16] < 1e-5
    stored = [way.missed for way in site.ways if way.choice.sign_threshold is None and not way.choice.blockwise]
    assert stored == sorted(stored, reverse=True) and stored[-1] == 0 and stored[-2] < 1e-3
    sure = [way for way in site.ways if way.choice.sign_threshold == 1.5 and not way.choice.blockwise]
    assert sure[0].wrong > sure[-1].wrong


def test_an_option_takes_as_many_bytes_as_it_says():
    z = torch.randn(900, 24)
    site = Site()
    site.observe(z, z - z.mean(0), z.mean(0))
    for way in (way for way in site.ways if way.choice.sign_threshold is None):
        kept = sum(tensor.nbytes for tensor in sketched(z, way.choice).tensors)
        bits = way.choice.bits or 0
        # Bits of directions and two vectors of FP32 are not counted; the limits of signs are, though there are none.
        missing = 8 * 24 if not bits else 0 if way.choice.blockwise else 4 * min(directions_for(bits), 24)
        assert kept == way.bytes + missing - (4 * 24 if bits else 0), way.choice


def test_columns_take_no_matrix_of_directions():
    for choice in (Choice(4, blockwise=True), Choice(16, blockwise=True), Choice(None), Choice(4, 2.0, 0.5, True)):
        kept = sketched(torch.randn(300, 64), choice)
        assert max(tensor.nbytes for tensor in kept.tensors[kept.layout.coefficients.parts :]) == 4 * 64


def test_maps_without_a_sketch_have_options_too():
    site = Site()
    site.observe_quantized(torch.randn(10, 4, 2))
    assert [way.choice.bits for way in site.ways] == list(ELEMENT_BITS) and site.shape == (10, 8)
    assert [way.bytes for way in site.ways] == [20, 40, 80, 160, 320] and not site.sketched
    assert [way.missed for way in site.ways] == sorted((way.missed for way in site.ways), reverse=True)


# --- in a run


def run(path, *overrides, resumed=False, expect=None):
    folder = RunFolder(path, resumed=resumed)
    config = compose_config(
        *SIZES, "compression=auto", "compression.budget=0.05", "training.epochs=24", "runs=2", *overrides
    )
    console = Console(file=io.StringIO(), width=120)
    Experiment(config, folder, console).run(yaml.safe_dump(asdict(config)))
    return json.loads((path / "summary.json").read_text()), console.file.getvalue()


def test_a_run_records_its_plans_and_shows_them(tmp_path):
    summary, shown = run(tmp_path / "a", "compression.interval=8")
    plans = summary["plans"]
    assert [(plan["run"], plan["epoch"]) for plan in plans] == [(0, 0), (0, 8), (0, 16), (1, 8), (1, 16)]
    assert all(plan["saved_mib"] <= plan["budget_mib"] for plan in plans)
    assert plans[0]["expected_error"] is None and all(plan["expected_error"] > 0 for plan in plans[1:])
    for plan in plans[1:]:
        assert sum(each["error_share"] for each in plan["maps"]) == pytest.approx(1.0)
        assert [each["layer"] for each in plan["maps"]] == ["blocks.0", "blocks.1"]
    assert summary["memory"]["saved_mib"] == pytest.approx(plans[0]["saved_mib"], rel=0.02)
    assert summary["memory"]["saved_mib"] <= 0.05 * summary["memory"]["saved_mib_fp32"]
    assert all(plan["measured_error"] > 0 for plan in plans[1:])
    assert "gradient error 0." in shown and "bits a node" in shown
    assert read_run(tmp_path / "a") is not None
    figures.write(read_report([tmp_path / "a"]), tmp_path / "figures")
    drawn = (tmp_path / "figures" / "plan.svg").read_text()
    assert "blocks.0: " in drawn and "squared error, expected" in drawn and "after epoch 16" in drawn


def test_trials_take_a_small_share_of_the_epochs(tmp_path):
    config = compose_config(*SIZES, "compression=auto", "training.epochs=1000")
    made = planner.Planner(config, None, Console(), [])
    made._trials = planner.START
    spent = [made._due(epoch) for epoch in (5, 6, 20, 80)]
    assert [due for due, _ in spent] == [True, False, True, True]
    assert all(trials <= 30 for due, trials in spent if due)
    short = planner.Planner(
        dataclasses.replace(config, training=dataclasses.replace(config.training, epochs=50)), None, Console(), []
    )
    assert not any(short._due(epoch)[0] for epoch in range(1, 51))


def test_a_resumed_run_keeps_its_plan(tmp_path, monkeypatch):
    whole, _ = run(tmp_path / "whole", "compression.interval=5", "checkpoint.every=3")
    record, left = train.record, iter(range(15))

    class Killed(BaseException):
        pass

    def records(*arguments):
        record(*arguments)
        if next(left) == 13:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "record", records)
        run(tmp_path / "part", "compression.interval=5", "checkpoint.every=3")
    resumed, _ = run(tmp_path / "part", "compression.interval=5", "checkpoint.every=3", resumed=True)
    timeless = [[plan | {"seconds": 0} for plan in each["plans"]] for each in (whole, resumed)]
    assert timeless[0] == timeless[1]
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "part")
    ]
    assert losses[0] == losses[1]


def test_what_fits_is_planned_with_less_when_memory_runs_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("iexact_runner.analysis.budgets.out_of_memory.available_bytes", lambda device: 2 * 2**20)
    from iexact_runner import training

    step, failures = training.step, iter([False, False, True])

    def failing(*arguments, **fields):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return step(*arguments, **fields)

    monkeypatch.setattr(training, "step", failing)
    with caplog.at_level(logging.WARNING):
        summary, _ = run(tmp_path / "a", "compression.budget=fit", "runs=1")
    plans = summary["plans"]
    assert summary["status"] == "completed" and [plan["epoch"] for plan in plans] == [0, 2]
    assert plans[1]["budget_mib"] < 0.75 * plans[0]["budget_mib"]
    assert "out of memory in epoch 3 of run 1: takes it again with" in caplog.text
    lines = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, 25))


def test_the_first_step_and_its_plan_are_taken_with_less_when_memory_runs_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("iexact_runner.analysis.budgets.out_of_memory.available_bytes", lambda device: 2 * 2**20)
    from iexact_runner import experiment
    from iexact_runner.tasks import planner

    def failing(function, failures):
        def maybe(*arguments, **fields):
            if next(failures, False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return function(*arguments, **fields)

        return maybe

    monkeypatch.setattr(experiment, "step_memory", failing(experiment.step_memory, iter([True])))
    monkeypatch.setattr(planner, "plan_training", failing(planner.plan_training, iter([True, False, True])))
    with caplog.at_level(logging.WARNING):
        summary, _ = run(tmp_path / "a", "compression.budget=fit", "runs=1", "compression.interval=100")
    first, second = summary["plans"]
    assert summary["status"] == "completed" and first["epoch"] == second["epoch"] == 0
    assert second["budget_mib"] == pytest.approx(0.7**2 * first["budget_mib"], rel=0.05)
    assert summary["memory"]["saved_mib"] == pytest.approx(second["saved_mib"], rel=0.05)
    assert caplog.text.count("out of memory while maps were planned") == 2
    assert caplog.text.count("out of memory in epoch 1 of run 1: takes it again with") == 1


def test_a_plan_keeps_less_than_what_ran_out_of_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("iexact_runner.analysis.budgets.out_of_memory.available_bytes", lambda device: 2**40)
    from iexact_runner import experiment

    step_memory, failures = experiment.step_memory, iter([True])

    def failing(*arguments, **fields):
        if next(failures, False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return step_memory(*arguments, **fields)

    monkeypatch.setattr(experiment, "step_memory", failing)
    summary, _ = run(tmp_path / "a", "compression.budget=fit", "runs=1", "compression.interval=100")
    first, second = summary["plans"]
    assert second["budget_mib"] == pytest.approx(0.7 * first["saved_mib"], rel=0.03)
    assert second["saved_mib"] <= second["budget_mib"]


@pytest.mark.parametrize("what", ["plan_training", "step_memory"])
def test_what_no_budget_helps_ends_in_out_of_memory(tmp_path, monkeypatch, caplog, what):
    from iexact_runner import experiment
    from iexact_runner.tasks import planner

    def failing(*arguments, **fields):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(planner if what == "plan_training" else experiment, what, failing)
    with pytest.raises(UserError) as raised:
        run(tmp_path / "a", "compression.budget=fit", "runs=1")
    # A plan may find first that the least its maps can be kept in is more.
    assert "out of memory" in str(raised.value) or (what == "step_memory" and "keeps at least" in str(raised.value))
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["status"] == "failed"
    assert 5 < caplog.text.count("out of memory") < 30


def test_an_evaluation_that_runs_out_of_memory_lowers_no_budget(tmp_path, monkeypatch, caplog):
    from iexact_runner import training
    from iexact_runner.phases import PhaseOutOfMemory

    def failing(*arguments, **fields):
        raise PhaseOutOfMemory("evaluation", "CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr("iexact_runner.analysis.budgets.out_of_memory.available_bytes", lambda device: 2 * 2**20)
    monkeypatch.setattr(training, "evaluate", failing)
    with pytest.raises(UserError, match="out of memory on cpu.* in evaluation"):
        run(tmp_path / "a", "compression.budget=fit", "runs=1")
    assert "takes it again" not in caplog.text


def test_a_fixed_budget_is_not_lowered(tmp_path, monkeypatch):
    from iexact_runner import training

    def failing(*arguments, **fields):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(training, "step", failing)
    with pytest.raises(UserError, match="out of memory"):
        run(tmp_path / "a")


def test_fidelity_is_that_of_the_plan_in_force(tmp_path):
    summary, _ = run(
        tmp_path / "a", "task=fidelity", "fidelity.epochs=[2,9]", "fidelity.draws=2", "compression.interval=8"
    )
    assert [(plan["run"], plan["epoch"]) for plan in summary["plans"]] == [(0, 0), (0, 8), (1, 8)]
    assert all(0 < error < 1 for error in summary["fidelity"]["after"]["9"]["relative_error"])


@pytest.mark.parametrize("sampler", ["cluster", "saint_rw"])
def test_the_largest_batch_is_what_a_budget_is_for(tmp_path, sampler):
    summary, _ = run(
        tmp_path / "a", f"sampler={sampler}", f"dataset.root={tmp_path}", "runs=1", "compression.budget=0.2"
    )
    assert summary["memory"]["saved_mib"] <= summary["plans"][0]["budget_mib"]


# --- a model of one's own


class Net(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.convs = nn.ModuleList([conv(20, 32), conv(32, 32), conv(32, 5)])
        self.norms = nn.ModuleList([nn.BatchNorm1d(32), nn.BatchNorm1d(32)])

    def forward(self, x, edge_index):
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = F.dropout(F.relu(norm(conv(x, edge_index))), 0.3, self.training)
        return self.convs[-1](x, edge_index)


@pytest.mark.parametrize("conv", [SAGEConv, GCNConv, GATConv])
def test_a_model_of_ones_own_keeps_a_budget(conv):
    torch.manual_seed(0)
    x, edges, y = torch.randn(800, 20), torch.randint(0, 800, (2, 5000)), torch.randint(0, 5, (800,))
    net = Net(conv).train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    compress(net, "auto", budget_mib=0.1)
    for measured in (False, True):
        if measured:
            plan = deal_budget(net, (x, edges), lambda scores: F.cross_entropy(scores, y))
            assert plan.error > 0
        with SavedTensors(net, excluded=[x, edges]) as saved:
            scores = net(x, edges)
            kept = sum(record.bytes for record in saved.kept(scores))
        assert kept <= 0.1 * MIB
        F.cross_entropy(scores, y).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items() if name.endswith("weight"))


def test_errors_of_a_budget_for_a_model_of_ones_own():
    with pytest.raises(
        ConfigError, match=r"^compression.budget_mib=null: must be given to compress a model with auto$"
    ):
        compress(Net(SAGEConv), "auto")
    with pytest.raises(
        ConfigError, match=r'^model=Net: must be compressed by compress\(model, "auto", budget_mib=N\)$'
    ):
        deal_budget(Net(SAGEConv), (), lambda scores: scores.sum())


# --- its configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["compression.budget=2"],
            "compression.budget=2: must be above 0 and at most 1, a share of what FP32 keeps, or",
        ),
        (["compression.budget=most"], "compression.budget=most: must be above 0 and at most 1"),
        (["compression.budget_mib=-1"], "compression.budget_mib=-1.0: must be above 0"),
        (["compression.budget=0.1", "compression.budget_mib=3"], "compression.budget=0.1: give compression.budget or"),
        (["compression.interval=0"], "compression.interval=0: must be 1 or more"),
        (["compression.map_bits=48"], "compression.map_bits=48: compression=auto chooses it for each map"),
        (["compression.share_maps=false"], "compression.share_maps=false: compression=auto shares its maps"),
    ],
)
def test_errors_of_the_configuration(overrides, message):
    with pytest.raises(ConfigError) as error:
        compose_config("compression=auto", *overrides)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_budget_is_of_auto_alone():
    with pytest.raises(ConfigError, match=r"^compression.budget_mib=3.0: is of compression=auto$"):
        compose_config("compression=lowrank", "compression.budget_mib=3")


def test_labels_say_the_budget():
    labels = [
        compression_label(asdict(preset("auto", **fields)))
        for fields in ({}, {"budget_mib": 24.0}, {"budget": 0.05, "interval": 30})
    ]
    assert labels == ["auto, what fits", "auto, 24 MiB", "auto, 0.05 of FP32, interval 30"]


def test_choices_are_said_in_words():
    assert Choice(48).label(sketched=True) == "48 bits a node, all signs"
    assert UNPLANNED.label(sketched=True) == "48 bits a node, signs below 2 deviations"
    assert [Choice(bits).label(sketched=False) for bits in (None, 16, 4)] == ["FP32", "BF16", "INT4"]
    assert Choice(16, blockwise=True).label(sketched=True) == "BF16, all signs"


def test_a_plan_that_is_never_small_enough_says_so():
    class Swelling:
        kept = 0

        def saved(self, directions):
            if isinstance(directions, list) and not directions:
                directions.append(Directions())
                directions[0].observe_quantized(torch.randn(100, 8))
            self.kept += 1000
            return 10_000 + self.kept

        def layer(self):
            return "layer"

    with pytest.raises(ConfigError, match="a step keeps at least"):
        make_plan(Swelling(), budget=10_500, field="compression.budget_mib", trials=0)


@pytest.mark.parametrize("target", ["GraphSAGE", "GIN"])
def test_a_run_with_a_model_of_pygs_keeps_a_share_of_fp32(tmp_path, target):
    # PyG copies the normalisation, which tensors without memory cannot be.
    fields = ("model=module", f"model.target=torch_geometric.nn:{target}", "+model.kwargs={norm:batch_norm}")
    folder, config = (
        RunFolder(tmp_path / "a"),
        compose_config(
            "dataset=synthetic",
            "dataset.num_nodes=600",
            "compression=auto",
            "compression.budget=0.1",
            "compression.interval=2",
            "training.epochs=3",
            *fields,
        ),
    )
    Experiment(config, folder, Console(file=io.StringIO())).run(yaml.safe_dump(asdict(config)))
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    memory, plans = summary["memory"], summary["plans"]
    assert memory["saved_mib"] <= plans[0]["budget_mib"] == pytest.approx(0.1 * memory["saved_mib_fp32"], rel=1e-3)
    assert [plan["epoch"] for plan in plans] == [0, 2] and plans[1]["expected_error"] > 0


def test_of_two_plans_the_nearer_to_the_exact_gradient_is_taken(monkeypatch):
    model, problem, config = prepared()
    tried = []
    real = TrainingTrial.gradient

    def gradient(self, directions):
        found = real(self, directions)
        tried.append((found[0], [state.choice for state in directions]))
        return found

    monkeypatch.setattr(TrainingTrial, "gradient", gradient)
    plan = plan_training(model, problem, config, seed=1)
    (exact, _), *plans = tried[-3:]
    errors = {tuple(choices): ((found - exact).norm() / exact.norm()).item() for found, choices in plans}
    assert plan.measured_error == pytest.approx(min(errors.values()))
    assert errors[tuple(plan.choices())] == min(errors.values())


def test_without_room_on_the_host_the_expected_error_decides(monkeypatch, caplog):
    model, problem, config = prepared("model=gcn2")

    def exact(self, maps):
        raise ConfigError.of(
            "compression.offload_folder", "/tmp", "cannot hold a file of 9 MiB: No space left on device"
        )

    dealt = []
    best = make_plan.__globals__["_best"]

    def told(trial, plans, base, **options):
        dealt.extend(plans)
        return best(trial, plans, base, **options)

    monkeypatch.setattr(TrainingTrial, "exact", exact)
    monkeypatch.setitem(make_plan.__globals__, "_best", told)
    plan = plan_training(model, problem, config, seed=1)
    assert plan.measured_error is None and plan.error > 0 and plan.saved <= plan.budget
    errors = [sum(each.error for each in one.maps) for one in dealt]
    assert plan.maps == dealt[0].maps != dealt[1].maps and errors[0] < errors[1]
    assert "takes the plan of the least expected error: compression.offload_folder=/tmp: cannot hold" in caplog.text


def test_a_plan_stays_where_memory_runs_out_while_maps_are_measured(tmp_path, monkeypatch, caplog):
    def exact(self, maps):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(TrainingTrial, "exact", exact)
    summary, _ = run(tmp_path / "a", "compression.interval=8", "runs=1")
    assert summary["status"] == "completed" and [plan["epoch"] for plan in summary["plans"]] == [0]
    assert "keeps its plan after epoch 8: out of memory while maps were measured" in caplog.text


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_bytes_of_the_maps_are_nearly_all_that_is_kept(share):
    # Of many nodes, beside whose maps directions and statistics are small.
    model, problem, config = prepared("model.dropout=0.5", f"compression.budget={share}", "dataset.num_nodes=3000")
    plan = plan_training(model, problem, config, seed=1)
    assert sum(each.bytes for each in plan.maps) == pytest.approx(plan.saved, rel=0.1)


def test_signs_of_a_sketch_are_tried_as_the_option_of_the_nearest_bits_has_them():
    ways = [
        Way(
            Choice(bits, threshold),
            bytes=bits,
            sign_bytes=10 - threshold - bits / 100,
            missed=1 / bits,
            wrong=bits / 1e4,
        )
        for bits in (8, 40, 128)
        for threshold in (0.5, 1.0)
    ]
    usual = Way(Choice(48, 0.7), bytes=48.0, sign_bytes=20.0, missed=0.1, wrong=0.0)
    found = _with_signs(Site(usual=usual, ways=[*ways, Way(Choice(None), 999.0, 99.0, 0.0, 0.0)]))
    assert found == Way(Choice(48, 1.0), bytes=48.0, sign_bytes=10 - 1.0 - 0.4, missed=0.1, wrong=40 / 1e4)
