from __future__ import annotations

import pytest
from scipy import stats

from iexact_runner.report.paired import interval
from iexact_runner.report.reading import read_report
from recorded import FP32, record


def report_of(tmp_path, *runs, **options):
    for index, run in enumerate(runs):
        record(tmp_path / str(index), **run)
    return read_report([tmp_path], **options)


def cells(report):
    return [row.cells.get("test_difference") for row in report.results.rows]


def test_interval_is_that_of_a_t_test():
    differences = [0.01, -0.02, 0.005, 0.03]
    low, high = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert interval(differences) == pytest.approx((high - low) / 2)


def test_repeats_are_paired_by_seed_and_number(tmp_path):
    """A second folder of the same configuration adds its pairs; what has no partner is left out."""
    fp32 = [{"compression": FP32, "scores": (0.9, 0.92)}, {"compression": FP32, "scores": (0.8,), "seed": 1}]
    own = [{"scores": (0.8, 0.92)}, {"scores": (0.9,), "seed": 1}, {"scores": (0.1,), "seed": 2}]
    reference, compared = cells(report_of(tmp_path, *fp32, *own))
    assert reference is None
    assert (compared.value, compared.repeats) == (pytest.approx(0.0), 3)
    assert compared.interval == pytest.approx(interval([-0.1, 0.0, 0.1]))


@pytest.mark.parametrize(
    "other", [{"training": {"lr": 0.5}}, {"dataset": {"name": "cora"}}, {"model": {"name": "gcn"}}]
)
def test_partner_differs_in_nothing_but_its_compression(tmp_path, other):
    assert cells(report_of(tmp_path, {"compression": FP32} | other, {})) == [None, None]


def test_a_row_with_figures_of_other_tasks_is_paired_by_its_scores(tmp_path):
    measured = {"task": "measure", "training": {"epochs": 500}}
    reference, compared = cells(report_of(tmp_path, {"compression": FP32}, {}, measured))
    assert reference is None and compared.repeats == 2


def test_one_pair_has_no_interval(tmp_path):
    report = report_of(tmp_path, {"compression": FP32, "scores": (0.9,)}, {"scores": (0.8,)})
    assert cells(report) == [None, None]
    assert "test_difference" not in [metric.name for metric in report.results.metrics]


def test_column_stands_beside_the_scores_and_only_where_it_is_wanted(tmp_path):
    runs = ({"compression": FP32}, {})
    names = [metric.name for metric in report_of(tmp_path, *runs).results.metrics]
    assert names.index("test_difference") == names.index("test") + 1
    assert [metric.name for metric in read_report([tmp_path], metrics=["test"]).results.metrics] == ["test"]
    chosen = read_report([tmp_path], metrics=["test_difference"])
    assert chosen.grids(title="t")[0].rows[1][-1] == "0.00 ± 0.00"
