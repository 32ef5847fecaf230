"""Runs that do not fit into memory: what they say, and what they record."""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path

import pytest
import torch
from rich.console import Console

from conftest import tiny_dataset
from iexact_runner import experiment, training
from iexact_runner.cli import compose_config
from iexact_runner.config import CompressionConfig
from iexact_runner.errors import OutOfMemory
from iexact_runner.experiment import Experiment
from iexact_runner.measure import MIB, out_of_memory
from iexact_runner.measure.out_of_memory import memory_by_preset, requested, step_advice
from iexact_runner.measure.step import kept_tensors, step_memory
from iexact_runner.nn import build_model
from iexact_runner.phases import PhaseOutOfMemory, is_out_of_memory, phase
from iexact_runner.problem import prepare
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks import train

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4194304 "
    "bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8 GiB")
NUMPY = MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64")


@pytest.mark.parametrize(
    ("error", "amount"), [(CPU, "4.00 MiB"), (CUDA, "2.50 GiB"), (NUMPY, "7.45 GiB"), (MemoryError(), "")]
)
def test_what_was_asked_for(error, amount):
    assert is_out_of_memory(error) and requested(error) == amount
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_the_innermost_phase_is_named_and_its_frames_are_given_up():
    class Map:
        """Something whose life can be watched."""

    def fails_with_a_map():
        held = Map()
        lives.append(weakref.ref(held))
        raise RuntimeError(str(CPU))

    lives = []
    with pytest.raises(PhaseOutOfMemory, match="can't allocate memory") as caught, phase("training step"):
        with phase("evaluation"):
            fails_with_a_map()
    assert caught.value.phase == "evaluation" and requested(caught.value) == "4.00 MiB"
    assert "fails_with_a_map" in caught.value.__notes__[0]
    caught.value.__traceback__ = None  # as a run does
    caught._excinfo = None
    assert lives[0]() is None
    with pytest.raises(RuntimeError, match="shapes differ"), phase("data"):
        raise RuntimeError("shapes differ")


@pytest.mark.parametrize("model", ["sage", "gcn", "gcn2", "gat"])
@pytest.mark.parametrize("compression", ["none", "int8", "iexact", "lowrank"])
def test_kept_bytes_are_known_without_allocating(model, compression):
    config = compose_config(f"model={model}", f"compression={compression}", "model.num_layers=3")
    device = torch.device("cpu")
    problem = prepare(tiny_dataset(), config.model, inductive=False, device=device)
    net = build_model(config.model, in_channels=13, out_channels=3, compression=config.compression)
    measured = step_memory(net, problem, config, device=device, seed=0)
    memory, smaller, widest = memory_by_preset(problem, config)
    if compression == "lowrank":  # how many signs are stored depends on the data
        assert memory["saved_mib"] == pytest.approx(measured["saved_mib"], rel=0.1)
        memory |= {name: measured[name] for name in ("saved_mib", "tensors")}
    assert {name: memory[name] for name in ("saved_mib", "saved_mib_fp32", "tensors")} == {
        name: measured[name] for name in ("saved_mib", "saved_mib_fp32", "tensors")
    }
    assert set(memory) == set(measured)
    assert all(size < memory["saved_mib"] * MIB for size in smaller.values()) and compression not in smaller
    kept_in_fp32 = kept_tensors(config.model, problem, CompressionConfig(scheme="none"))
    assert widest == max(record.bytes_fp32 for record in kept_in_fp32)


def test_first_preset_that_fits_is_suggested():
    memory, smaller = {"saved_mib": 100.0}, {"int8": 30 * MIB, "int2": 10 * MIB, "iexact": 3 * MIB}
    for available, words in (
        (165, "compression=int8 keeps 30.00 MiB, which would fit"),
        (164, "compression=int2 keeps 10.00 MiB, which would fit"),
        (138, "compression=iexact keeps 3.00 MiB, which would fit"),
        (137, "no preset is sure to fit; lower model.hidden_channels or model.num_layers"),
    ):
        text = step_advice(memory, smaller, MIB, available=available * MIB)
        assert text.startswith("the backward pass needs 100.00 MiB of maps") and text.endswith(words)
    assert step_advice(memory, smaller, MIB, available=None).endswith("compression=iexact keeps 3.00 MiB")
    assert "no preset is sure to fit" in step_advice(memory, {}, MIB, available=None)


@pytest.mark.skipif(sys.platform != "linux", reason="limits are as Linux has them")
@pytest.mark.parametrize(
    ("limit", "expected"), [(resource.RLIM_INFINITY, 8 * 2**30), (2**30, 2**30 - 3 * resource.getpagesize())]
)
def test_available_is_the_machine_s_or_the_rest_of_the_limit(monkeypatch, limit, expected):
    files = {"/proc/self/statm": "3 2 1 1 0 1 0", "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8388608 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: {resource.RLIMIT_AS: (limit, limit)}[kind])
    assert out_of_memory.available_bytes(torch.device("cpu")) == expected
    files["/proc/meminfo"] = "MemTotal: 9 kB\n"
    assert out_of_memory.available_bytes(torch.device("cpu")) is None
    monkeypatch.setattr(Path, "read_text", lambda path: path.joinpath("missing").read_bytes())
    assert out_of_memory.available_bytes(torch.device("cpu")) is None


def fails(path, monkeypatch, target, name, error, *overrides):
    def raises(*_, **__):
        raise error

    config = compose_config("training.epochs=3", "model.hidden_channels=16", "compression=plain", *overrides)
    with monkeypatch.context() as patch, pytest.raises(OutOfMemory) as caught:
        patch.setattr(target, name, raises)
        Experiment(config, RunFolder(path), Console(file=io.StringIO())).run("the: config\n")
    summary = json.loads((path / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["error"] == str(caught.value)
    return str(caught.value), summary["memory"]


@pytest.mark.parametrize("error", [CPU, CUDA, NUMPY], ids=["CPU", "CUDA", "numpy"])
def test_training_that_does_not_fit_is_told_what_would(tmp_path, monkeypatch, error):
    message, memory = fails(tmp_path, monkeypatch, train, "train_epochs", error)
    failed = f"out of memory on cpu when allocating {requested(error)} in a training step"
    assert message.startswith(f"{failed}: the backward pass needs 1.")
    assert "compression=int8 keeps" in message and "would fit" in message and "\n" not in message
    assert memory["saved_mib"] > 0 and memory["step_peak_mib"] > 0 and memory["tensors"]


def test_model_that_does_not_fit_once_still_has_its_tensors_recorded(tmp_path, monkeypatch):
    message, memory = fails(tmp_path, monkeypatch, experiment, "step_memory", CPU)
    assert "compression=int8 keeps" in message
    assert memory["saved_mib"] == memory["saved_mib_fp32"] > 0 and memory["step_peak_mib"] is None
    assert sum(tensor["bytes"] for tensor in memory["tensors"]) == memory["saved_mib"] * MIB


def test_data_that_do_not_fit(tmp_path, monkeypatch):
    message, memory = fails(tmp_path, monkeypatch, experiment, "load_dataset", NUMPY)
    assert message == "out of memory on cpu when allocating 7.45 GiB for the data of digits: a smaller graph is needed"
    assert memory is None


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        ([], "lower model.hidden_channels, or halve the maps with precision=bfloat16"),
        (["precision=bfloat16", "model=gat"], "lower model.hidden_channels or model.heads"),
    ],
)
def test_evaluation_that_does_not_fit_does_not_blame_what_is_kept(tmp_path, monkeypatch, overrides, advice):
    message, memory = fails(tmp_path, monkeypatch, training, "score", CPU, *overrides)
    failed = "out of memory on cpu when allocating 4.00 MiB in evaluation"
    assert message == f"{failed}: evaluation holds a few maps of all 1,797 nodes under every preset; {advice}"
    assert memory["saved_mib"] > 0


def limited_run(folder, compression):
    """``iexact`` in a process that gets 1000 MiB more than it has when the data are loaded."""
    code = """
        import resource, sys
        from pathlib import Path
        from iexact_runner import cli, experiment

        def limited(*arguments, **options):
            prepared = prepare(*arguments, **options)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 1000 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return prepared

        prepare, experiment.prepare = experiment.prepare, limited
        cli.main()
    """
    overrides = ("dataset=synthetic", "dataset.num_nodes=60000", "model.hidden_channels=256", "model.num_layers=5")
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        f"compression={compression}",
        "training.epochs=1",
        *overrides,
    ]
    result = subprocess.run(
        [*command, f"hydra.run.dir={folder}"], capture_output=True, text=True, timeout=300, check=False
    )
    return result, json.loads((folder / "summary.json").read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="limits are set as Linux has them")
def test_suggested_preset_runs_where_fp32_did_not(tmp_path):
    result, summary = limited_run(tmp_path / "fp32", "plain")
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    failed = "out of memory on cpu when allocating 58.59 MiB in a training step"
    assert result.stderr == (
        f"iexact: {failed}: the backward pass needs 1186.53 MiB of maps; compression=int8 keeps 193.64 MiB, which would"
        " fit; iexact advise compares all ways to need less\n"
    )
    assert summary["status"] == "failed" and summary["memory"]["saved_mib"] == pytest.approx(1186.53, abs=0.01)
    result, summary = limited_run(tmp_path / "int8", "int8")
    assert result.returncode == 0 and summary["status"] == "completed", result.stderr
