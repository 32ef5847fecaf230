"""The same seed gives the same numbers, and nobody's random state is touched."""

from __future__ import annotations

import io
import json
import os
import random

import numpy as np
import pytest
import torch
from rich.console import Console

from conftest import projected, tiny_dataset
from iexact_runner import experiment
from iexact_runner.cli import compose_config
from iexact_runner.compression import dequantize, quantize
from iexact_runner.config import CompressionConfig
from iexact_runner.data import load_dataset
from iexact_runner.determinism import deterministic_algorithms
from iexact_runner.errors import ConfigError
from iexact_runner.experiment import Experiment
from iexact_runner.kernels import backends
from iexact_runner.nn import build_model, compress
from iexact_runner.problem import prepare
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks import train
from iexact_runner.training import Optimization, evaluate, step

SMALL = ("dataset=synthetic", "dataset.num_nodes=150", "model.hidden_channels=8", "training.epochs=3")
LOWRANK = CompressionConfig(scheme="lowrank", bits=4, rank=4, share_maps=True)


def run(path, *overrides):
    Experiment(compose_config(*SMALL, *overrides), RunFolder(path), Console(file=io.StringIO())).run("the: config\n")
    metrics = path / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return [{name: value for name, value in line.items() if name not in ("seconds", "time")} for line in lines]


@pytest.mark.parametrize(("model", "compression"), [("sage", "iexact"), ("gat", "none"), ("gcn2", "lowrank")])
def test_same_seed_same_numbers_to_the_last_bit(tmp_path, model, compression):
    overrides = ("deterministic=true", f"model={model}", f"compression={compression}")
    assert run(tmp_path / "a", *overrides) == run(tmp_path / "b", *overrides)


def test_setting_ends_with_the_run(tmp_path, monkeypatch):
    seen = []
    epochs = train.train_epochs

    def looks(*arguments, **options):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        yield from epochs(*arguments, **options)

    monkeypatch.setattr(train, "train_epochs", looks)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    run(tmp_path / "a", "deterministic=true", "compression=none")
    assert seen == [(True, ":4096:8")] and not torch.are_deterministic_algorithms_enabled()


def test_setting_of_the_caller_comes_back():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_algorithms(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        with deterministic_algorithms(False):
            assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_operation_without_a_deterministic_form_is_named(tmp_path, monkeypatch):
    def raises(*_, **__):
        raise RuntimeError("put_ does not have a deterministic implementation, but you set 'torch.use_...'. You can")

    monkeypatch.setattr(experiment, "step_memory", raises)
    with pytest.raises(ConfigError, match="^deterministic=true: put_ does not have a deterministic implementation"):
        run(tmp_path / "a", "deterministic=true", "compression=none")


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_codes_do_not_depend_on_the_number_of_threads(backend, bits):
    if backend == "numba":
        pytest.importorskip("numba")
    x = torch.randn(3001, 37)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(quantize(x, bits=bits, block_size=100, seed=3, backend=backend))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.codes, found[0].codes)
        assert torch.equal(other.zero, found[0].zero) and torch.equal(other.scale, found[0].scale)


def global_states():
    python, numpy = random.getstate(), np.random.get_state()
    return python, numpy[1].tolist(), numpy[2], torch.random.get_rng_state().tolist()


def a_training_step(compression):
    config = compose_config("model=gat", "model.label_input=true", "compression=none").model
    problem = prepare(tiny_dataset(), config, inductive=False, device=torch.device("cpu"))
    model = build_model(config, in_channels=problem.in_channels, out_channels=3, compression=compression)
    optimization = Optimization(model, compose_config().training)
    before = global_states()
    step(model, optimization, problem, seed=3, epoch=1)
    evaluate(model, problem)
    return before


def a_converted_model():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    x, before = torch.randn(30, 8), global_states()
    compress(model, projected(bits=2), seed=0)
    model(x).sum().backward()
    return before


def a_run(path, *overrides):
    before = global_states()
    run(path, *overrides)
    return before


def a_call(function):
    before = global_states()
    function()
    return before


@pytest.mark.parametrize(
    "work",
    [
        lambda _: a_call(lambda: dequantize(quantize(torch.ones(50, 8), bits=2, block_size=16, seed=0))),
        lambda _: a_training_step(projected(bits=2, kept_frac=0.5)),
        lambda _: a_training_step(LOWRANK),
        lambda _: a_converted_model(),
        lambda _: a_call(lambda: load_dataset(compose_config("dataset=digits").dataset)),
        lambda _: a_call(lambda: load_dataset(compose_config("dataset=synthetic").dataset)),
        lambda _: a_call(lambda: backends.resolve("auto", torch.device("cpu"))),
        lambda path: a_run(path, "compression=none"),
        lambda path: a_run(path, "compression=iexact", "deterministic=true"),
        lambda path: a_run(path, "compression=iexact", "task=measure", "measure.timed_epochs=3"),
        lambda path: a_run(path, "compression=iexact", "task=fidelity", "fidelity.epochs=[1]", "fidelity.draws=2"),
        lambda path: a_run(path, "compression=int2", "task=distribution"),
    ],
    ids=["quantize", "step", "low-rank step", "compress", "digits", "synthetic", "backend"]
    + ["train in FP32", "train", "measure", "fidelity", "distribution"],
)
def test_random_state_of_the_caller_is_left_alone(tmp_path, work):
    before = work(tmp_path)
    assert global_states() == before
