"""Gradients of schemes against the exact one: what the figures mean, and that only the draws differ."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from conftest import FP32, tiny_dataset
from iexact_runner.analysis import fidelity
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.experiment import Experiment
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare
from iexact_runner.runs.records import RunFolder
from iexact_runner.sampling import with_batches
from iexact_runner.schemes import lowrank
from iexact_runner.training import Optimization, step

QUICK = ("task=fidelity", "model.hidden_channels=16", "fidelity.epochs=[1,3]", "fidelity.draws=4")


def prepared(*overrides, compression=None):
    config = compose_config(*QUICK, *overrides)
    problem = prepare(tiny_dataset(), config.model, inductive=False, device=torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(
        config.model,
        in_channels=problem.in_channels,
        out_channels=problem.num_classes,
        compression=compression or config.compression,
    )
    return model, problem, config


def overall(*overrides):
    model, problem, config = prepared(*overrides)
    return dict(fidelity.checkpoints(model, problem, config, seed=1))


def test_figures_are_those_of_their_formulas():
    exact = torch.randn(50, dtype=torch.float64)
    draws = [exact + 0.3 + torch.randn(50, dtype=torch.float64) for _ in range(8)]
    deviations = fidelity.Deviations()
    for drawn in draws:
        deviations.add(drawn, exact)
    figures = deviations.figures(whole=1.0)
    errors = torch.stack(draws) - exact
    norm = exact.norm()
    assert figures["relative_error"] == pytest.approx((errors.norm(dim=1).mean() / norm).item())
    cosines = torch.stack([drawn @ exact / drawn.norm() / norm for drawn in draws])
    assert figures["cosine"] == pytest.approx(cosines.mean().item())
    assert figures["bias"] == pytest.approx((errors.mean(0).norm() / norm).item())
    assert figures["bias_standard_error"] == pytest.approx(((errors.var(0).sum() / 8).sqrt() / norm).item())


def test_bias_stands_out_from_its_standard_error():
    exact = torch.ones(1000)
    found = []
    for offset in (0.0, 1.0):
        deviations = fidelity.Deviations()
        for _ in range(50):
            deviations.add(exact + offset + torch.randn(1000), exact)
        found.append(deviations.figures(whole=1.0))
    unbiased, biased = found
    assert unbiased["bias"] == pytest.approx(unbiased["bias_standard_error"], rel=0.15)
    assert biased["bias"] > 5 * biased["bias_standard_error"]


@pytest.mark.parametrize("model", ["sage", "gcn", "gcn2", "gat"])
def test_exact_twin_has_the_gradient_of_plain_modules(model):
    twin, problem, config = prepared(f"model={model}", "model.dropout=0")
    twin.compression = fidelity.exact_twin(config.compression)
    plain, _, _ = prepared(f"model={model}", "model.dropout=0", compression=FP32)
    ours, theirs = (
        fidelity.gradients(network, problem, kind=config.training.loss, seed=3) for network in (twin, plain)
    )
    largest = max(gradient.norm() for gradient in theirs)
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine - expected).norm() <= 1e-5 * largest  # some are zero but for rounding


@pytest.mark.parametrize(
    "overrides",
    [("compression.bits=null", "compression.kept_frac=1"), ("compression=none",), ("compression=none", "model=gat")],
    ids=" ".join,
)
def test_what_is_exact_has_no_error_for_the_masks_are_the_same(overrides):
    for figures in overall(*overrides).values():
        assert figures["relative_error"] < 1e-5 and figures["cosine"] == pytest.approx(1.0)


def test_draws_differ_and_more_bits_err_less():
    errors = [overall("compression=int1", f"compression.bits={bits}")[3]["relative_error"] for bits in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 1e-4
    model, problem, config = prepared()
    first, again, other = (
        fidelity.gradients(model, problem, kind=config.training.loss, seed=1, map_seed=map_seed)[0]
        for map_seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_comparing_leaves_the_training_alone():
    model, problem, config = prepared()
    list(fidelity.checkpoints(model, problem, config, seed=1))
    straight, _, _ = prepared(compression=fidelity.exact_twin(config.compression))
    optimization = Optimization(straight, config.training)
    for epoch in (1, 2, 3):
        step(straight, optimization, problem, seed=fidelity.mix(1, epoch), epoch=epoch)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_gradient_that_is_zero_has_no_relative_figures():
    figures = overall()[3]
    before_norm = figures["parameters"]["blocks.0.conv.lin_l.bias"]
    assert before_norm["relative_error"] is None and before_norm["share"] < 1e-6
    assert figures["parameters"]["head.lin_l.weight"]["relative_error"] > 0
    shares = [parameter["share"] ** 2 for parameter in figures["parameters"].values()]
    assert sum(shares) == pytest.approx(1.0)


def test_record_and_screen_of_the_task(tmp_path):
    screen = io.StringIO()
    config = compose_config(*QUICK, "runs=2")
    Experiment(config, RunFolder(tmp_path), Console(file=screen, width=160)).run("a: b\n")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "completed" and summary["accuracy"] is None and summary["throughput"] is None
    record = summary["fidelity"]
    assert record["draws"] == 4 and list(record["after"]) == ["1", "3"]
    errors = record["after"]["3"]["relative_error"]
    assert len(errors) == 2 and errors[0] != errors[1]
    assert len(record["after"]["3"]["parameters"]["head.lin_l.weight"]["cosine"]) == 2
    assert "3 epochs" in screen.getvalue() and "head.lin_l.weight" in screen.getvalue()
    assert f"{sum(errors) / 2:.3f}" in screen.getvalue()


def test_directions_of_a_longer_refresh_are_those_of_earlier_weights(monkeypatch):
    """Left as they were found, those found at 6 epochs are closer than those found at 4 or at 0."""

    def errors():
        # Nothing is drawn where coefficients are exact and directions found, so two draws are as good as twenty.
        fields = ("compression=lowrank", "compression.rank=4", "compression.bits=null", "fidelity.epochs=[0,6]")
        fields += ("fidelity.draws=2",)
        found = {refresh: overall(*fields, f"compression.refresh={refresh}") for refresh in (1, 3, 7, 50)}
        # After 0 epochs there are no earlier ones.
        assert len({figures[0]["relative_error"] for figures in found.values()}) == 1
        return {refresh: figures[6]["relative_error"] for refresh, figures in found.items()}

    followed = errors()
    assert max(followed.values()) < 1.1 * followed[1] and len(set(followed.values())) == 3
    monkeypatch.setattr(lowrank, "followed_directions", lambda sample, directions: directions)
    left = errors()
    assert left[1] < left[3] < left[7] and left[7] == left[50]
    assert left[1] == followed[1] and left[3] > followed[3] and left[7] > followed[7]


@pytest.mark.parametrize("sampler", ["cluster", "saint_rw", "neighbor"])
def test_mini_batches_have_an_error_of_sampling_beside_that_of_compression(sampler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a partition is kept
    config = compose_config(
        "task=fidelity", "dataset=digits", f"sampler={sampler}", "fidelity.epochs=[1]", "fidelity.draws=6",
        "model.num_layers=2", "model.hidden_channels=16", "compression=iexact",
        *(["sampler.roots=100"] if sampler == "saint_rw" else []),
    )  # fmt: skip
    dataset = load_dataset(config.dataset)
    problem = prepare(dataset, config.model, inductive=False, device=torch.device("cpu"))
    problem = with_batches(problem, config, dataset, device=torch.device("cpu"))
    sizes = {"in_channels": problem.in_channels, "out_channels": problem.num_classes}
    model = build_model(config.model, **sizes, compression=config.compression)
    (figures,) = dict(fidelity.checkpoints(model, problem, config, seed=1)).values()
    compression, sampling, both = (part["relative_error"] for part in (figures, figures["sampling"], figures["both"]))
    assert compression > 0.05 and sampling > 0.05
    assert max(sampling, 0) < both < sampling + 3 * compression

    exact = dataclasses.replace(config, compression=compose_config("compression=none").compression)
    model = build_model(config.model, **sizes, compression=exact.compression)
    (figures,) = dict(fidelity.checkpoints(model, problem, exact, seed=1)).values()
    assert figures["relative_error"] == 0
    assert figures["both"] == figures["sampling"]
