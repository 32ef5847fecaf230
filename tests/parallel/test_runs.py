"""A run over several processes: one folder, records of all, errors of one line, and a run that goes on after a loss."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time

import numpy as np
import pytest

import commands
from iexact_runner.errors import ConfigError, TeamError
from iexact_runner.parallel.team import Team, backend_of, joined
from parallel.processes import in_processes

FIELDS = (
    "parallel=graph",
    "parallel.parts=2",
    "parallel.partition=label_propagation",
    "model=sage",
    "compression=lowrank",
)


def start(folder, size, *overrides, fields=FIELDS, epochs=4):
    """Processes of a run, as torchrun starts them."""
    words = ("-m", "iexact_runner", *fields, f"training.epochs={epochs}", *overrides)
    return commands.start_ranks(size, *words, cwd=folder)


def ended(processes):
    """Exit status, screen and errors of each."""
    found = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *texts) for process, texts in zip(processes, found, strict=True)]


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), lines


def test_a_run_has_one_folder_and_goes_on_with_another_number_of_processes(tmp_path):
    whole = ended(start(tmp_path, 2, "output_dir=whole", epochs=6))
    assert [status for status, *_ in whole] == [0, 0], whole
    assert "epoch 6/6" in whole[0][1] and whole[1][1] == "" and whole[1][2] == ""
    (folder,) = (tmp_path / "whole").iterdir()
    summary, expected = records(folder)
    parallel = summary["parallel"]
    assert parallel["parts"] == parallel["processes"] == len(parallel["ranks"]) == 2
    assert sum(rank["nodes"] for rank in parallel["ranks"]) == 1797
    assert all(rank["sent_mib"] > 0 and rank["halo"] > 0 and rank["step_peak_mib"] > 0 for rank in parallel["ranks"])
    assert len(expected) == 6 and summary["status"] == "completed"
    for name in ("saved_mib", "step_peak_mib", "data_mib"):
        assert summary["memory"][name] == max(rank[name] for rank in parallel["ranks"])
    # A run that loses a process goes on from its checkpoint, with as many processes to the last bit.
    processes = start(tmp_path, 2, "output_dir=cut", "checkpoint.every=1", epochs=40)
    path = tmp_path / "cut"
    while not (path.exists() and any(path.glob("*/checkpoint.previous.pt"))):
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGKILL)
    (status, _, error), (killed, *_) = ended(processes)
    assert status == 1 and killed == -signal.SIGKILL
    (line,) = [line for line in error.splitlines() if line.startswith("iexact: ")]
    assert "process 0 of 2 on" in line and f": process 1 on {socket.gethostname()} has ended" in line
    assert "resume=auto" in line
    (folder,) = path.iterdir()
    summary, lines = records(folder)
    assert summary["status"] == "failed" and summary["error"] in line and lines
    shutil.copytree(folder, tmp_path / "copy")
    again = [records_of(tmp_path, size, resumed) for size, resumed in ((2, folder), (1, tmp_path / "copy"))]
    assert again[0][: len(lines)] == [line["loss"] for line in lines] and len(again[0]) == 40
    assert again[0][:6] == [line["loss"] for line in expected]
    # Sums of another order move codes, and these the weights: from then on the runs part slowly.
    few = slice(0, len(lines) + 4)
    np.testing.assert_allclose(again[1][few], again[0][few], rtol=1e-3)
    assert len(again[1]) == 40


def records_of(folder, size, resumed):
    """The losses of a run that goes on to its end with so many processes."""
    results = ended(start(folder, size, f"resume={resumed}", epochs=40))
    assert [status for status, *_ in results] == [0] * size, results
    return [line["loss"] for line in records(resumed)[1]]


def test_processes_measure_and_compare_together(tmp_path):
    quick = ("measure.timed_epochs=4", "measure.warmup_epochs=1", "fidelity.epochs=[1]", "fidelity.draws=2")
    for task in ("measure", "fidelity"):
        fields = (f"task={task}", f"output_dir={task}", "messages.forward=int4", *quick)
        results = ended(start(tmp_path, 2, *fields, epochs=1))
        assert [status for status, *_ in results] == [0, 0], results
        assert results[1][1] == results[1][2] == ""
        (folder,) = (tmp_path / task).iterdir()
        summary = json.loads((folder / "summary.json").read_text())
        assert len(summary["parallel"]["ranks"]) == 2
        if task == "measure":
            assert summary["throughput"]["timed_epochs"] == 4
        else:
            assert summary["fidelity"]["after"]["1"]["relative_error"][0] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=deepergcn"], "model=deepergcn: parallel=graph works with sage, gcn, gcn2, gat, graphconv"),
        (["model=gat", "model.label_input=true"], "model.label_input=true: parallel=graph works with false"),
        (["compression=auto"], "compression.budget=fit: parallel=graph needs what each process may keep"),
        (["sampler=cluster"], "sampler=cluster: parallel=graph works with none"),
        (["task=inspect"], "task=inspect: parallel=graph works with train"),
        (
            ["dataset=cora", "dataset.inductive=true", "parallel.folder=parts"],
            "parallel.folder=parts: parts in files are of the whole graph: dataset.inductive=true needs null",
        ),
        (["compression.rounding=stochastic"], "compression.rounding=stochastic: parallel=graph works with nearest"),
        (["parallel.parts=1"], "parallel.parts=1: must be at least the number of processes, 2"),
        (["parallel.parts=5000"], "parallel.parts=5000: must be at most the 1797 nodes"),
        (["messages.forward=int3"], "messages.forward=int3: "),
        (["parallel=none"], "parallel=none: 2 processes were started: use graph"),
        (["-m"], "-m: started in several processes; processes=N starts"),
    ],
)
def test_what_does_not_work_is_one_line_and_leaves_nothing(tmp_path, overrides, message):
    fields = FIELDS[3:] if overrides == ["parallel=none"] else FIELDS
    fields, overrides = (("-m", *FIELDS, "seed=0,1"), []) if overrides == ["-m"] else (fields, overrides)
    results = ended(start(tmp_path, 2, *overrides, fields=fields))
    assert all(status for status, *_ in results)
    (line,) = [line for line in results[0][2].splitlines() if line.startswith("iexact: ")]
    assert message in line and not [line for line in results[1][2].splitlines() if line.startswith("iexact: ")]
    assert not any((tmp_path / "outputs").glob("*/summary.json")) or "parts" in message


def told(team):
    values = team.from_first("first" if team.first else None), team.gathered(team.rank)
    with team.first_alone():
        order = time.monotonic()
    team.agree(torch="2", graph=(3, 4.0))
    try:
        team.agree(torch="2", graph=(3, float(team.rank)))
    except ConfigError as error:
        return *values, order, str(error)
    return *values, order, ""


def test_processes_tell_each_other():
    found = in_processes(3, told)
    assert all(each[:2] == ("first", [0, 1, 2]) for each in found)
    assert found[0][2] <= min(each[2] for each in found[1:])
    assert {each[3] for each in found} == {"process 1: graph is (3, 1.0), in process 0 it is (3, 0.0)"}
    alone = told(Team())
    assert alone[:2] == ("first", [0]) and alone[3] == ""


def lost(team):
    """What a process says of one that is gone, and of one that noticed with it."""
    if team.rank == 2:
        time.sleep(1)
        return ""
    with pytest.raises(TeamError) as raised, team.guarded():
        raise RuntimeError("Connection closed by peer")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return str(raised.value)


def test_processes_that_notice_a_loss_name_the_one_that_does_not():
    first, second, _ = in_processes(3, lost)
    place = f": process 2 on {socket.gethostname()} has ended, or has not answered for 60 s"
    assert place in first and place in second


def test_a_process_that_keeps_the_notes_and_hangs_holds_up_no_other(monkeypatch):
    class Hanging:
        def set(self, *arguments):
            asked.set()
            threading.Event().wait()

    asked = threading.Event()
    monkeypatch.setattr("iexact_runner.parallel.team.CHECK_IN", 0.1)
    start = time.monotonic()
    with pytest.raises(TeamError, match=": process 0 has ended, or has not answered"):
        with Team(1, 2, 1, 5.0, Hanging()).guarded():
            raise RuntimeError("timed out")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert asked.is_set() and time.monotonic() - start < 10


def test_only_a_lost_process_is_told_as_one():
    team = Team(1, 2, 1, 5.0)
    with (
        pytest.raises(TeamError, match=r"process 1 of 2 on .*: another process has ended, or has not .* 5 s"),
        team.guarded(),
    ):
        raise RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.7]:25010")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(RuntimeError, match="shapes"), team.guarded():
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="peer"), Team().guarded():
        raise RuntimeError("Connection closed by peer")


def test_a_gpu_talks_by_nccl_and_lists_of_rows_by_gloo(monkeypatch):
    assert backend_of("cpu") == "gloo"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert backend_of("auto") == "cpu:gloo,cuda:nccl" and backend_of("cpu") == "gloo"


def test_a_launcher_without_an_address_is_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set; start the processes with torchrun"):
        with joined(device="cpu", timeout=1):
            pass
