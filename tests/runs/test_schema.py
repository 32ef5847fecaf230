"""Every kind of damage to what reports are made of is named: the field, what is there, what is valid."""

from __future__ import annotations

import copy
import json

import pytest

from iexact_runner.report.metrics import METRICS
from iexact_runner.runs.records import DamagedRecord, read_run
from iexact_runner.runs.schema import Summary, check
from recorded import edit_summary, observed_map, record

AFTER = {"5": {"relative_error": [2.5, None]}}


@pytest.fixture
def run(tmp_path):
    """A record with everything that reports are made of."""
    folder = record(tmp_path / "run", task="distribution")
    observed = [[observed_map("head", js=0.1, reduction=0.1)]]
    edit_summary(folder, distribution=observed, fidelity={"after": AFTER}, energy={"kwh": 0.1, "gco2e": None})
    summary = json.loads((folder / "summary.json").read_text())
    highest = {f"highest_{split}": summary["accuracy"][split] for split in ("train", "val")}
    edit_summary(folder, accuracy=summary["accuracy"] | highest)
    edit_summary(folder, throughput=summary["throughput"] | {"seconds_to_best": {"values": [1.5, 2.5]}})
    edit_summary(folder, fp32={"step_peak_mib": 2.0, "evaluation_peak_mib": 1.0, "epochs_per_second": None})
    sizes = {"p50": 1, "p95": 2, "max": 3}
    batches = {"an_epoch": 4, "edges_share": 0.5, "partition": {"method": "metis", "edge_cut": 0.1, "seconds": 1.0}}
    names = ("nodes", "edges", "saved_mib", "step_peak_mib")
    edit_summary(folder, batches=batches | dict.fromkeys(names, sizes))
    return folder


DAMAGES = [
    ("accuracy.test.values.0", True, "accuracy.test.values[0]=true: expected float, got bool"),
    ("accuracy.test.values.1", 1.5, "accuracy.test.values[1]=1.5: expected float <= 1.0"),
    ("accuracy.val.values", "0.9", 'accuracy.val.values="0.9": expected array, got str'),
    ("accuracy.test.values.0", None, "accuracy.test.values[0]=null: expected float, got null"),
    ("accuracy.metric", ["a"], 'accuracy.metric=["a"]: expected str | null, got array'),
    ("accuracy", 5, "accuracy=5: expected object | null, got int"),
    ("config.dataset.name", [1], "config.dataset.name=[1]: expected str | null, got array"),
    ("config.model.name", 7, "config.model.name=7: expected str | null, got int"),
    ("config.seed", {}, "config.seed: expected int, got object"),
    ("config.runs", -1, "config.runs=-1: expected int >= 0"),
    ("config.compression.scheme", None, "config.compression.scheme=null: expected str, got null"),
    ("config.many", dict.fromkeys(map(str, range(1000))), "fields: must be at most 1000"),
    ("environment", [], "environment=[]: expected object | null, got array"),
    ("memory.saved_mib", "1.5", 'memory.saved_mib="1.5": expected float | null, got str'),
    ("memory.saved_mib", 1e40, "memory.saved_mib=1e+40: expected float <= 1e+39"),
    ("memory.tensors.0.bytes", 0.5, "memory.tensors[0].bytes=0.5: expected int, got float"),
    ("memory.tensors.0.op", None, "memory.tensors[0].op=null: expected str, got null"),
    ("throughput.epochs_per_second.median", [1], "epochs_per_second.median=[1]: expected float, got array"),
    (
        "throughput.epochs_per_second.p20",
        9.0,
        "throughput.epochs_per_second: p20, median and p80 must be in this order",
    ),
    ("throughput.epochs_per_second", {"median": 1.0}, "epochs_per_second: object missing required field p20"),
    ("fp32.step_peak_mib", -1, "fp32.step_peak_mib=-1: expected float >= 0.0"),
    ("energy.kwh", -1, "energy.kwh=-1: expected float >= 0.0"),
    ("fidelity.after", {"x": {}}, "fidelity.after: expected str matching regex"),
    ("fidelity.after.5.relative_error", ["x"], "expected float | null, got str"),
    ("distribution.0.0.js_uniform", None, "distribution[0][0].js_uniform=null: expected float, got null"),
    ("distribution.0.0.optimal", {"measured": 1.0}, "distribution[0][0].optimal: object missing required field reduct"),
    ("distribution.0.0.observed", [0.5, 0.5], "distribution[0][0].observed=[0.5, 0.5]: expected array of length >= 3"),
    ("distribution.0.0.observed", [0.5] * 3, "observed and clipped_normal must be of the same length"),
]


@pytest.mark.parametrize(
    ("path", "value", "reason"), DAMAGES, ids=[f"{path}-{number}" for number, (path, *_) in enumerate(DAMAGES)]
)
def test_damage_is_named(run, path, value, reason):
    summary = json.loads((run / "summary.json").read_text())
    place = summary
    *way, last = [int(part) if part.isdigit() and part != "5" else part for part in path.split(".")]
    for part in way:
        place = place[part]
    place[last] = value
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DamagedRecord) as error:
        read_run(run)
    assert str(error.value).startswith(f"{run / 'summary.json'}: ") and reason in str(error.value)


def test_a_whole_record_passes_and_more_may_be_in_it(run):
    before = json.loads((run / "summary.json").read_text())
    edit_summary(run, notes={"anything": [1, "a", None]})
    assert read_run(run).lookup("notes.anything") == [1, "a", None]
    check(copy.deepcopy(before), Summary)


def test_an_unfinished_run_is_held_to_the_same(tmp_path):
    path = record(tmp_path / "run", status="unfinished") / "config.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: [1]"))
    with pytest.raises(DamagedRecord, match=r"config.yaml: seed=\[1\]: expected int, got array"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("path", [metric.path for metric in METRICS.values() if metric.path])
def test_every_metric_is_checked_where_it_stands(run, path):
    summary = json.loads((run / "summary.json").read_text())
    place = summary
    *way, last = path.split(".")
    for part in way:
        place = place[part]
    place[last] = "words"
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DamagedRecord, match=f"{path}="):
        read_run(run)
