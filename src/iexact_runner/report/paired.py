"""Test scores against those of FP32 with the same seeds: the mean of the paired differences and its interval.

Repeats are paired by seed and number: one draws the same initial weights and split as the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

from iexact_runner.report.grouping import Results, Row, experiment_of
from iexact_runner.report.metrics import METRICS, Cell, Metric
from iexact_runner.runs.records import Run, mean_std

DIFFERENCE = METRICS["test_difference"]
CONFIDENCE = 0.95


def with_differences(results: Results, *, usual: bool) -> Results:
    """Results with the cell ``test_difference`` in the rows that have a partner in FP32.

    Args:
        results: rows of runs.
        usual: whether to add the column where there is such a row, though nobody asked for it.
    """
    wanted = DIFFERENCE in results.metrics
    if not wanted and not usual:
        return results
    partners = {_partner_key(row): row for row in results.rows if _is_fp32(row)}
    rows = [_compared(row, None if _is_fp32(row) else partners.get(_partner_key(row))) for row in results.rows]
    metrics = results.metrics
    if not wanted and any(DIFFERENCE.name in row.cells for row in rows):
        metrics = _behind(metrics, "test")
    return replace(results, rows=rows, metrics=metrics)


def interval(differences: Sequence[float]) -> float:
    """Half the width of the 95% interval of the mean of two differences or more (Student's t)."""
    from scipy.special import stdtrit  # slow to import

    count = len(differences)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    deviation: float = mean_std(differences)["std"]
    return quantile * deviation / math.sqrt(count)


def _compared(row: Row, partner: Row | None) -> Row:
    own, other = _scores(row.runs), _scores([] if partner is None else partner.runs)
    differences = [score - other[repeat] for repeat, score in own.items() if repeat in other]
    if len(differences) < 2:
        return row
    pooled = mean_std(differences)
    cell = Cell(pooled["mean"], std=pooled["std"], repeats=len(differences), interval=interval(differences))
    return replace(row, cells=row.cells | {DIFFERENCE.name: cell})


def _scores(runs: Sequence[Run]) -> dict[tuple[int, int], float]:
    """Test scores by seed of the run and number of the repeat."""
    return {
        (run.lookup("config.seed"), number): score
        for run in runs
        for number, score in enumerate(run.lookup("accuracy.test.values") or [])
    }


def _is_fp32(row: Row) -> bool:
    return all(run.lookup("config.compression.scheme") == "none" for run in row.runs)


def _partner_key(row: Row) -> str:
    """What the runs with scores have in common: all but the compression; a row that mixes more has no partner."""
    keys = {
        json.dumps({name: value for name, value in experiment_of(run).items() if not name.startswith("compression.")})
        for run in row.runs
        if run.lookup("accuracy.test.values")
    }
    return " ".join(sorted(keys))


def _behind(metrics: Sequence[Metric], name: str) -> list[Metric]:
    place = next((index + 1 for index, metric in enumerate(metrics) if metric.name == name), len(metrics))
    return [*metrics[:place], DIFFERENCE, *metrics[place:]]
